"""The command line: python -m fastnn train | bench | info."""

import sys

from fastnn._cli import Parser, Problem
from fastnn.bench import command as bench
from fastnn.info import show as info
from fastnn.train import command as train


def main(arguments=None):
    """Runs one command; exit status 2 and one line on stderr for what cannot be done."""
    parser = Parser(prog="python -m fastnn", description="fastnn: drop-in faster torch.nn layers")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True, parser_class=Parser)

    train_parser = commands.add_parser("train", help="train the MNIST CNN with torch.nn and with fastnn side by side")
    train.add_options(train_parser)
    train_parser.set_defaults(run=train.run)
    bench_parser = commands.add_parser("bench", help="time fastnn's operators against torch's")
    bench.add_options(bench_parser)
    bench_parser.set_defaults(run=bench.run)
    info_parser = commands.add_parser("info", help="what this installation is and what runs natively")
    info_parser.set_defaults(run=lambda options: info())

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except Problem as problem:
        print(f"python -m fastnn {options.command}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"python -m fastnn {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
