// What the rules that choose a convolution's algorithm share; conv2d_choose.cpp asks them in order.
#pragma once
#include "../conv2d.h"

namespace fastnn::cpu::choice {

// What the rules speak of; channels are those of one group.
struct Shape {
  int64_t c, k, taps, pixels;
  bool pointwise;    // 1x1, stride 1, no padding
  bool winograd;     // 2x2 to 5x5, stride 1, and channels enough for its transforms to pay
  bool batch;        // images enough to fill the lanes of the batch algorithm, and small matrices of weights
  bool vendor_fits;  // torch's direct kernel wants output channels in sixteens
  bool sixteens;     // so are input channels
  bool together;     // NHWC
};

inline bool dilated(const Conv2dParams& p) { return p.dilation_h * p.dilation_w > 1; }
inline bool fills_lanes(const Conv2dParams& p) { return 4 * p.N >= 3 * 16 * ceil_div(p.N, 16); }  // an image per lane

bool takes(const Conv2dParams& p, Conv2dAlgorithm algorithm);

// ---- Winograd ------------------------------------------------------------------------------------------------------

bool fills_tiles(const Conv2dParams& p);
bool may_be_winograd(const Conv2dParams& p);
int64_t tiles_of(const Conv2dParams& p);
bool winograd_counts_less(const Conv2dParams& p);
// Instead of what the other rules chose.
bool winograd_pays(const Conv2dParams& p, const Shape& s);
bool winograd_beats(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen);
bool strided_winograd_pays(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen);
bool batch_winograd_pays(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen);

// ---- groups --------------------------------------------------------------------------------------------------------

Conv2dAlgorithm best_depthwise(const Conv2dParams& p, const Shape& s);
Conv2dAlgorithm among_groups(const Conv2dParams& p, const Shape& s, Conv2dAlgorithm chosen);

// ---- both ----------------------------------------------------------------------------------------------------------

bool thin_batch(const Conv2dParams& p, int64_t sums, int64_t results);

}  // namespace fastnn::cpu::choice
