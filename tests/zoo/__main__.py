"""The whole zoo, `make zoo`: every model checked, then how many layers were converted, what was left, and why.

Half an hour on one quiet core; the largest, regnet_y_128gf and vit_h_14, take 14 GB of memory.
"""

import argparse
import sys
import traceback
import warnings
from collections import Counter

from rich.console import Console
from rich.table import Table

from zoo.check import examine
from zoo.models import ALL

# With one model or kind of layer a line, only those with more than this many layers are named.
NAMED = 20


def main():
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="only models whose library-name contains one of these")
    names = parser.parse_args().names
    entries = [e for e in ALL if not names or any(n in str(e) for n in names)]
    warnings.filterwarnings("ignore")
    console, done, failed = Console(width=140), [], []
    for entry in entries:
        try:
            outcome = examine(entry, strict=True)
        except Exception:
            traceback.print_exc()
            failed.append(str(entry))
            console.print(f"[red]FAILED[/] {entry}")
            continue
        done.append(outcome)
        errors = " ".join(f"{what} {ours:.0e}/{theirs:.0e}" for what, (ours, theirs) in outcome.errors.items())
        console.print(
            f"{entry}: {outcome.converted} layers converted, {sum(outcome.left.values())} left; "
            f"errors ours/torch.nn's: {errors}; {outcome.seconds:.1f} s",
            highlight=False,
        )
    summarize(console, done, failed)
    sys.exit(bool(failed))


def summarize(console, done, failed):
    left, calls = Counter(), Counter()
    for outcome in done:
        left.update(outcome.left)
        calls.update(outcome.fallbacks)
    models = Table(title="the zoo", show_header=False)
    for library in ("torchvision", "timm"):
        models.add_row(f"{library} models equal to torch.nn", str(sum(o.name.startswith(library) for o in done)))
    models.add_row("models that failed", f"{len(failed)} {' '.join(failed)}")
    models.add_row("layers converted", str(sum(o.converted for o in done)))
    models.add_row("layers left to torch", str(left.total()))
    console.print(models)
    layers = Table("layers", "type", "why it stays", title=f"left to torch (kinds with more than {NAMED} layers)")
    for (kind, reason), count in left.most_common():
        if count > NAMED:
            layers.add_row(str(count), kind, reason)
    layers.add_row(str(sum(n for n in left.values() if n <= NAMED)), "other kinds", "")
    console.print(layers)
    table = Table("calls", "op", "why", title="calls of converted layers that went to torch's kernels")
    for (op, reason), count in calls.most_common():
        table.add_row(str(count), op, reason)
    console.print(table)


if __name__ == "__main__":
    main()
