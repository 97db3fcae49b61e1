// What the kernels and the choices among them ask of the CPU beyond its instruction set. No result's bits depend on it,
// except by the algorithm chosen.
#pragma once

namespace fastnn::cpu {

// Whether the active kernels' vectors of 512 bits are multiplied whole, two a cycle (Intel, Zen 5), not by halves
// (Zen 4): what saves products for more memory traffic pays less there.
bool whole_wide_vectors();

// Intel's cores have few buffers for lines under way, and a prefetch keeps one until its line has come: it pays less,
// and most in the order of memory, where the hardware goes ahead of it.
bool intel();

}  // namespace fastnn::cpu
