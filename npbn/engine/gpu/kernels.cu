// The CUDA kernels of the fused engine, which compute training steps and evaluations.
//
// `launch.py` decides which kernels run in which order. `npbn/functional` contains the formulas and
// their derivations, with the same names of variables. The type `real` is float or double. NVRTC
// compiles this file for GPUs. In tests without a GPU, g++ compiles this file for the CPU: see
// `tests/emulated_gpu`.
//
// Stages. The network is divided into stages. A stage begins with an affine map y = A x + b, which
// is a convolution or a linear layer. Batch norm, an activation and pooling may follow. Batch norm
// needs sums over the whole batch. These sums are complete only when the launch that computes y has
// ended. So a launch computes the end of one stage and the beginning of the next stage:
//
// - A forward kernel reads the y of the previous stage. It applies batch norm, activation and
//   pooling to the numbers that it reads, and it writes the y of its own stage.
// - A backward kernel reads dz, the gradient with respect to the output of batch norm of its own
//   stage. It writes the dz of the previous stage, and the gradients of its own parameters.
//
// Each pair of brackets in this picture is a launch. An apostrophe marks a backward pass:
//
//     y0 → [ norm, activation, pooling · affine map ] → y1 → [ ... ] → y2 → ... → loss
//     dz0 ← [ pooling', activation' · affine map' · norm' ] ← dz1 ← [ ... ] ← dz2 ← ... ← dlogits
//
// In the comments of this file, S is the stage whose affine map a kernel computes, and P is the
// previous stage. If S is the first stage, P is the images: a stage without any operation.
//
// Kernels. A block has THREADS threads, in one dimension. A part is a range of consecutive examples
// of the batch. An array `planes` stores each map as one plane: see `Planes`. A launch is one call
// of a kernel. The comments give the indices of an array in parentheses, from the slowest to the
// fastest: in an array (example, channel, row, column), elements of neighbouring columns are
// adjacent in memory.
//
//   conv_forward          computes the end of P and the convolution of S
//                         grid: (parts)
//   conv_backward         computes the backward pass of conv_forward
//                         grid: (parts for dx, then other parts for dw and db)
//   linear_forward        computes the end of P and the linear layer of S
//                         grid: (parts, tiles of TILE outputs)
//   linear_backward       computes the backward pass of linear_forward
//                         grid: (parts × tiles of dx, then other parts × tiles of dw and db)
//   linear_cross_entropy  computes the last linear layer, the loss, and their backward passes
//                         grid: (parts)
//   cross_entropy         computes the loss and its backward pass, if linear_cross_entropy cannot
//                         grid: (parts)
//   sgd                   adds the partial sums of the gradients, and updates all parameters
//                         grid: (ranges of PARAMETERS_PER_BLOCK parameters)
//
// CUDA graphs. No kernel allocates memory, waits for the host, or needs a number from the host that
// changes from step to step. In training, *step is a counter in the GPU's memory: the number of the
// step in the epoch. So the launches of a step can be captured in a CUDA graph, and the graph can
// be launched repeatedly. In evaluation, *step is the number of the batch.
//
// Reproducibility. The order of all sums is fixed: first within a thread, then over the threads of
// a block, then over the blocks. There are no atomic additions. So two runs give the same bits.

constexpr int THREADS = 256;
constexpr int TILE = 16;            // the number of rows and of columns of a matrix product's tile
constexpr int TILE_K = 128;         // the number of terms of each sum in shared memory at a time
constexpr int VECTOR = 4;           // the numbers that a thread reads from shared memory at once
constexpr int ROWS_PER_THREAD = 4;  // the rows of a convolution's output that a thread computes
constexpr int MAPS_PER_THREAD = 2;  // the output maps for which a thread computes these rows
constexpr int TAPS_PER_THREAD = 5;  // the weights in a kernel row whose gradients a thread computes
constexpr int BANKS = 32;           // the banks of shared memory; word i is in bank i % BANKS
constexpr int PARAMETERS_PER_BLOCK = 32;  // the parameters that a block of `sgd` updates

// The minimum number of blocks per multiprocessor, for __launch_bounds__ of the forward kernels.
// A low number allows each thread many registers. With many registers, a thread
// can wait for many loads at the same time.
template <typename real>
constexpr int MIN_BLOCKS = sizeof(real) == 4 ? 2 : 1;

// The sizes of a stage, as values that are known only at run time.
struct Shape {
    int channels, height, width;                                       // of the input x: (C, H, W)
    int maps, rows, columns;                                           // of y: (O, H', W')
    int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;  // of the convolution
    int window_h, window_w;  // of a pooling window; windows do not overlap
    int maximum;             // 1: maximum pooling; 0: average pooling
    int activation;          // SIGMOID, RELU, or 0 if there is none
};

// The sizes of a stage, as constants that the compiler knows. So the compiler can unroll loops and
// can replace divisions by multiplications. Every kernel takes a Fixed or a Shape for each of its
// stages. The letters P and Q of this template are the numbers of rows and columns of y.
template <int C, int H, int W, int O, int P, int Q, int KH, int KW, int SH, int SW, int PH, int PW,
          int A, int B, int MAXIMUM, int ACTIVATION>
struct Fixed {
    static constexpr int channels = C, height = H, width = W;
    static constexpr int maps = O, rows = P, columns = Q;
    static constexpr int kernel_h = KH, kernel_w = KW, stride_h = SH, stride_w = SW;
    static constexpr int padding_h = PH, padding_w = PW;
    static constexpr int window_h = A, window_w = B;
    static constexpr int maximum = MAXIMUM, activation = ACTIVATION;
};

constexpr int SIGMOID = 1, RELU = 2;  // the values of `activation`; 0 means none

// The examples of a batch. Example e of the batch is example order[*step · stride + e] of the data
// set. If `order` is null, example e of the batch is example *step · stride + e of the data set.
// The array `images` (example, channel, row, column) contains the pixels of the data set, 0 to 255.
// The array `labels` contains the class of each example of the data set. The array `order` contains
// the indices of the epoch's examples, batch after batch.
struct Batch {
    const unsigned char* images;
    const int *labels, *order, *step;
    int stride;
};

// A mean, stored as the sum mean + rest of two numbers. One float is not accurate enough for a
// large mean: see "Rounding" in `functional/batch_norm.py`. The number `mean` is the
// rounded value, and `rest` is the rounding error. Two floats together have 48 bits. A double has
// 53, but many GPUs compute doubles at 1/64 of the speed of floats.
template <typename real>
struct alignas(2 * sizeof(real)) Mean {
    real mean, rest;
};

// The batch norm of a stage. The pointer `gamma` is null if the stage has no batch norm. All arrays
// except `means` and `squares` have one element for each channel.
//
// Statistics of the batch exist in two forms. The kernel that computes y divides the batch into
// parts and writes the statistics of each part: means[o, part] is the mean of channel o over the
// examples of the part, and squares[o, part] is the sum of the squared distances from this mean. A
// part has `examples_per_part` examples; the last part may have fewer. The next kernel of the
// forward pass merges the parts and writes the statistics of the whole batch, `mean` and `var`. The
// later kernels of the step, and all kernels in prediction, read `mean` and `var`. For these
// kernels, the pointer `means` is null.
//
// The arrays `mean` and `rest` contain the two numbers of each channel's `Mean`. In prediction,
// `rest` is null.
template <typename real>
struct Norm {
    const real *gamma, *beta;
    const Mean<real>* means;
    const real* squares;
    real *mean, *rest, *var, *moving_mean, *moving_var;
    int parts, examples_per_part;
    real eps, momentum;
};

// The sums that the backward pass of a stage's batch norm needs. The array `sums` has the indices
// (kind, channel, part): for each channel o and each part of the batch, sums[0, o, part] = Σ dz and
// sums[1, o, part] = Σ dz (y - μ), where μ is the channel's mean. The total of sums[0, o] over all
// parts is dβ, and the total of sums[1, o] is s·dγ, where s = sqrt(var + eps). The arrays
// `dgamma` and `dbeta` contain the gradients dγ and dβ, with one element for each channel.
template <typename real>
struct Sums {
    real* sums;
    int parts;
    real *dgamma, *dbeta;
};

// An entry of the table of parameter tensors, for `sgd`. In the array of all parameters, the tensor
// begins at `offset` and has `size` elements. The gradient of the tensor is the sum of `partials`
// partial sums. They are in the array `partials` of `sgd`, from the element `partial_offset` on,
// with the indices (partial sum, parameter). If `partials` is 0, the gradient is complete already.
// `decays` is 1 if weight decay applies to the tensor, else 0.
struct Tensor {
    int offset, size, partial_offset, partials, decays;
};

// -------------------------------------------------------------- functions that all kernels use

alignas(32) extern __shared__ double shared_memory[];

// The free rest of a block's shared memory. Each call of `allocate` returns a new
// array of `count` numbers.
template <typename real>
struct Memory {
    real* free = reinterpret_cast<real*>(shared_memory);

    __device__ real* allocate(int count) {
        real* allocated = free;
        // The next array begins at a multiple of VECTOR, because threads read whole vectors.
        free += (count + VECTOR - 1) / VECTOR * VECTOR;
        return allocated;
    }
};

// COUNT numbers, aligned so that a thread can read them together.
template <typename real, int COUNT>
struct alignas(COUNT * sizeof(real)) Vector {
    real v[COUNT];
};

// Calls store(t, load(t)) for each t from 0 to count - 1. The threads of the block share the work.
// A load from global memory takes hundreds of cycles, and the compiler must assume that a store
// changes what later loads read. So each thread repeatedly starts IN_FLIGHT loads and only then
// stores their results. A thread whose t is out of range loads the last element again, because a
// branch would delay the other loads.
template <int IN_FLIGHT, typename real, typename Load, typename Store>
__device__ __forceinline__ void batched_load_store(int count, Load load, Store store) {
    for (int start = threadIdx.x; start < count; start += IN_FLIGHT * THREADS) {
        real result[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; ++k) {
            result[k] = load(min(start + k * THREADS, count - 1));
        }
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; ++k) {
            if (start + k * THREADS < count) {
                store(start + k * THREADS, result[k]);
            }
        }
    }
}

// Replaces each of a thread's values by the sum of this value over a group of `group_size`
// consecutive threads. The size of a group is a power of two and at most 32, so a group lies within
// a warp. All threads of the block must call this function together. The function is not a barrier
// for shared memory.
template <int COUNT, typename T>
__device__ void group_sums(T (&values)[COUNT], int group_size) {
    for (int distance = group_size / 2; distance > 0; distance /= 2) {
        for (int k = 0; k < COUNT; ++k) {
            values[k] += __shfl_xor_sync(0xffffffffu, values[k], distance);
        }
    }
}

// Returns the sum of a value over a group of threads. The rules of `group_sums` apply.
template <typename T>
__device__ T group_sum(T value, int group_size) {
    T values[] = {value};
    group_sums(values, group_size);
    return values[0];
}

// Returns the number of consecutive threads for each channel, if the threads of a block are divided
// among all channels. The number is a power of two from 1 to 32.
__device__ constexpr int threads_per_channel(int channels) {
    int group_size = 32;
    while (group_size > 1 && group_size * channels > THREADS) {
        group_size /= 2;
    }
    return group_size;
}

// Returns a + b exactly, as the rounded sum and its rounding error (Knuth, "The Art of Computer
// Programming", volume 2, section 4.2.2, theorem B).
template <typename real>
__device__ Mean<real> exact_sum(real a, real b) {
    const real sum = a + b, b_in_sum = sum - a;
    return {sum, (a - (sum - b_in_sum)) + (b - b_in_sum)};
}

// Returns a - b, the difference of the means plus the difference of the rests. If a.mean and b.mean
// are close, their difference is exact (Sterbenz's lemma). If not, no digits cancel. So the error
// is about one rounding of the result, unless the two differences nearly cancel.
template <typename real>
__device__ real difference(Mean<real> a, Mean<real> b) {
    return (a.mean - b.mean) + (a.rest - b.rest);
}

// Returns the activation of z.
template <typename real>
__device__ real activated(int activation, real z) {
    if (activation == SIGMOID) {
        return 1 / (1 + exp(-z));
    }
    return activation == RELU && z <= 0 ? real(0) : z;
}

// Returns the derivative of the activation, computed from the activation's output a.
template <typename real>
__device__ real activation_derivative(int activation, real a) {
    if (activation == SIGMOID) {
        return a * (1 - a);
    }
    return activation == RELU && a == 0 ? real(0) : real(1);
}

// The batch norm of a stage, as a function of the channel o and of y. The function call operator
// returns z = (y - mean - rest) · scale + beta. If the stage has no batch norm, z = y. The arrays
// are in shared memory and have one element for each channel.
template <typename real>
struct Normalization {
    real *mean, *rest, *scale, *beta;

    __device__ real centred(int o, real y) const { return y - mean[o] - rest[o]; }
    __device__ real operator()(int o, real y) const { return centred(o, y) * scale[o] + beta[o]; }
};

// Returns the batch norm of stage P for a batch of n examples. If `norm.means` is not null, this
// function first merges the statistics of the parts of the batch. For one channel, part t has m_t
// values, the mean μ_t and the sum of squared distances q_t. The m values of the whole batch have
// the mean μ and the variance v:
//   μ = Σ_t m_t μ_t / m,   m v = Σ_t (q_t + m_t (μ_t - μ)²)
// (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
// variances", 1979, equation 2.1b for several parts). The first sum adds only distances from the
// mean of the first part, because distances are small numbers. Every block merges all parts,
// because an additional launch would take longer. Only the first block writes μ and v to `mean`,
// `rest` and `var`, and updates the moving averages.
template <typename real, typename P>
__device__ Normalization<real> normalization(P p, int n, const Norm<real>& norm,
                                             Memory<real>& memory) {
    const Normalization<real> result = {memory.allocate(p.maps), memory.allocate(p.maps),
                                        memory.allocate(p.maps), memory.allocate(p.maps)};
    const int group_size = threads_per_channel(p.maps), member = threadIdx.x % group_size,
              area = p.rows * p.columns;
    for (int first = 0; first < p.maps; first += THREADS / group_size) {
        const int o = first + threadIdx.x / group_size;
        real mean = 0, rest = 0, var = 0;
        if (norm.means != nullptr) {
            const int end = o < p.maps ? norm.parts : 0;
            const Mean<real>* means = norm.means + o * norm.parts;
            const real* squares = norm.squares + o * norm.parts;
            const Mean<real> first_mean = end > 0 ? means[0] : Mean<real>{};
            const real m = real(area) * n;
            const auto part_size = [&](int t) {
                return real(area) * min(norm.examples_per_part, n - t * norm.examples_per_part);
            };
            // Unrolling lets a thread start the loads of eight parts together. The order of the
            // additions is unchanged.
            real sum = 0;
#pragma unroll 8
            for (int t = member; t < end; t += group_size) {
                sum += part_size(t) * difference(means[t], first_mean);
            }
            const Mean<real> total =
                exact_sum(first_mean.mean, first_mean.rest + group_sum(sum, group_size) / m);
            sum = 0;
#pragma unroll 8
            for (int t = member; t < end; t += group_size) {
                const real d = difference(means[t], total);
                sum += squares[t] + part_size(t) * d * d;
            }
            var = group_sum(sum, group_size) / m;
            mean = total.mean;
            rest = total.rest;
            if (blockIdx.x == 0 && blockIdx.y == 0 && member == 0 && o < p.maps) {
                norm.mean[o] = mean;
                norm.rest[o] = rest;
                norm.var[o] = var;
                norm.moving_mean[o] =
                    norm.momentum * norm.moving_mean[o] + (1 - norm.momentum) * mean;
                norm.moving_var[o] = norm.momentum * norm.moving_var[o] + (1 - norm.momentum) * var;
            }
        } else if (norm.gamma != nullptr && o < p.maps) {
            mean = norm.mean[o];
            rest = norm.rest == nullptr ? real(0) : norm.rest[o];
            var = norm.var[o];
        }
        if (member == 0 && o < p.maps) {
            const bool none = norm.gamma == nullptr;
            result.mean[o] = mean;
            result.rest[o] = rest;
            result.scale[o] = none ? real(1) : norm.gamma[o] / sqrt(var + norm.eps);
            result.beta[o] = none ? real(0) : norm.beta[o];
        }
    }
    __syncthreads();
    return result;
}

// Returns the index in y at which the pooling window of an output of stage P begins, and sets
// *channel to the channel of this output. The output is element number `item` of example e after
// pooling, in the order (channel, row, column).
template <typename P>
__device__ int window_of(P p, int e, int item, int* channel) {
    const int columns = p.columns / p.window_w, rows = p.rows / p.window_h;
    const int q = item % columns, r = item / columns % rows;
    *channel = item / (columns * rows);
    return ((e * p.maps + *channel) * p.rows + r * p.window_h) * p.columns + q * p.window_w;
}

// Returns the largest activation in the pooling window that begins at y[first], and sets *chosen to
// the index in y of this activation. If several activations are equal, the first one is chosen. NaN
// counts as larger than any number. The last of several NaN is chosen.
template <typename real, typename P>
__device__ real largest_in(P p, const Normalization<real>& normalized, const real* y, int channel,
                           int first, int* chosen) {
    real largest = 0;
    for (int i = 0; i < p.window_h; ++i) {
        for (int j = 0; j < p.window_w; ++j) {
            const int at = first + i * p.columns + j;
            const real a = activated(p.activation, normalized(channel, y[at]));
            if (i + j == 0 || a > largest || a != a) {
                largest = a;
                *chosen = at;
            }
        }
    }
    return largest;
}

// The input x of stage S, as a function: input(e, item) is element number `item` of example e, in
// the order (channel, row, column). The element is computed from y, the output of P's affine map
// (example, channel, row, column), by batch norm, activation and pooling. If the pointer y is null,
// P is the images, and the element is a pixel / 255.
template <typename real, typename P>
struct Input {
    P p;
    Normalization<real> normalized;
    const real* y;
    Batch batch;
    // The number of examples before this batch: of the epoch, or in evaluation, of the data set. It
    // is 0 if y is not null.
    int first;

    __device__ real operator()(int e, int item) const {
        if (y == nullptr) {
            const int place = first + e;
            const long long example = batch.order == nullptr ? place : batch.order[place];
            return batch.images[example * (p.maps * p.rows * p.columns) + item] / real(255);
        }
        int o, chosen;
        const int begin = window_of(p, e, item, &o);
        if (p.maximum) {
            return largest_in(p, normalized, y, o, begin, &chosen);
        }
        real sum = 0;
        for (int i = 0; i < p.window_h; ++i) {
            for (int j = 0; j < p.window_w; ++j) {
                sum += activated(p.activation, normalized(o, y[begin + i * p.columns + j]));
            }
        }
        return sum / (p.window_h * p.window_w);
    }
};

// Returns the input x of stage S, as a function. The start of the batch is computed only if P is
// the images: the array y contains the current batch only.
template <typename real, typename P>
__device__ Input<real, P> input_of(P p, const Normalization<real>& normalized, const real* y,
                                   const Batch& batch) {
    return {p, normalized, y, batch, y == nullptr ? *batch.step * batch.stride : 0};
}

// Computes the backward pass of pooling and activation of stage P for one output of P: element
// number `item` of example e. The number g is the gradient with respect to this output. For
// each y in the output's pooling window, the function writes dz, the gradient with respect to the
// output of batch norm. It also adds dz to sums[0] and dz (y - μ) to sums[1], for the backward pass
// of batch norm. The activations are computed again from y.
template <typename real, typename P>
__device__ void input_backward(P p, const Normalization<real>& normalized, const real* y, int e,
                               int item, real g, real* dz, real (&sums)[2]) {
    int o, chosen = -1;
    const int begin = window_of(p, e, item, &o);
    if (p.maximum) {
        largest_in(p, normalized, y, o, begin, &chosen);
    } else {
        g /= p.window_h * p.window_w;
    }
    for (int i = 0; i < p.window_h; ++i) {
        for (int j = 0; j < p.window_w; ++j) {
            const int at = begin + i * p.columns + j;
            const real a = activated(p.activation, normalized(o, y[at]));
            const bool reached = !p.maximum || at == chosen;
            const real d = reached ? g * activation_derivative(p.activation, a) : real(0);
            sums[0] += d;
            sums[1] += d * normalized.centred(o, y[at]);
            dz[at] = d;
        }
    }
}

// The gradient dy of the loss with respect to y, as a function: dy(o, at) is the gradient with
// respect to the element y[at], which belongs to channel o. The function computes dy from dz by the
// backward pass of batch norm (`functional.batch_norm_backward`). The arrays y and dz have the
// indices (example, channel, row, column). A channel has m values in the batch, with mean μ, and
// s = sqrt(variance + eps):
//   dy = γ/s (dz - dβ/m - (y - μ) dγ/(s m)),   dβ = Σ dz,   dγ = Σ dz (y - μ) / s
// If the stage has no batch norm, dy = dz.
template <typename real>
struct Gradient {
    const real *y, *dz;
    Normalization<real> normalized;
    real *shift, *factor;  // for each channel: dβ/m and dγ/(s m)
    bool norm;             // whether the stage has batch norm

    __device__ real operator()(int o, int at) const {
        if (!norm) {
            return dz[at];
        }
        return normalized.scale[o] * (dz[at] - shift[o] - normalized.centred(o, y[at]) * factor[o]);
    }
};

// Returns a `Gradient` object, which computes the gradient of the loss with respect to single
// elements of the y of stage S. This function also adds up dβ and dγ. Every block computes them,
// but only the first block writes them to `sums`. The caller must call __syncthreads before it uses
// the returned object.
template <typename real, typename S>
__device__ Gradient<real> gradient_of(S s, int n, const Norm<real>& norm, const Sums<real>& sums,
                                      const real* y, const real* dz, Memory<real>& memory) {
    const Normalization<real> normalized = normalization(s, n, norm, memory);
    const Gradient<real> result = {
        y, dz, normalized, memory.allocate(s.maps), memory.allocate(s.maps), norm.gamma != nullptr};
    const int group_size = threads_per_channel(s.maps), member = threadIdx.x % group_size;
    const real m = real(n) * s.rows * s.columns;
    for (int first = 0; result.norm && first < s.maps; first += THREADS / group_size) {
        const int o = first + threadIdx.x / group_size;
        const int end = o < s.maps ? sums.parts : 0;
        real totals[2] = {};
        for (int t = member; t < end; t += group_size) {
            totals[0] += sums.sums[o * sums.parts + t];
            totals[1] += sums.sums[(s.maps + o) * sums.parts + t];
        }
        group_sums(totals, group_size);
        if (member == 0 && o < s.maps) {
            const real root = sqrt(norm.var[o] + norm.eps);
            result.shift[o] = totals[0] / m;
            result.factor[o] = totals[1] / (root * root * m);
            if (blockIdx.x == 0) {
                sums.dbeta[o] = totals[0];
                sums.dgamma[o] = totals[1] / root;
            }
        }
    }
    return result;
}

// Merges `count` new values of a channel into the statistics of this channel in one part of the
// batch (Chan, Golub and LeVeque, equation 2.1). The statistics are the mean, *part_mean, and the
// sum of the squared deviations from the mean, *part_squares. They describe the `had` values that
// were merged before.
// `mean` is the mean of the new values, rounded. sums[0] is the sum of (value - mean) over the new
// values: with exact arithmetic it would be 0, and it corrects the rounding of `mean`. sums[1] is
// the sum of (value - mean)^2 over the new values.
template <typename real>
__device__ void merge(int had, int count, real mean, const real (&sums)[2], Mean<real>* part_mean,
                      real* part_squares) {
    const real rest = sums[0] / count, squares = sums[1] - sums[0] * rest;
    const Mean<real> added = exact_sum(mean, rest);
    if (had == 0) {
        *part_mean = added;
        *part_squares = squares;
        return;
    }
    const real d = difference(added, *part_mean), weight = count / real(had + count);
    *part_mean = exact_sum(part_mean->mean, part_mean->rest + d * weight);
    *part_squares += squares + d * d * had * weight;
}

// ------------------------------------------------------------------------------- matrix products

// Computes one tile of a matrix product: Σ_k left(row, k) right(column, k) for begin <= k < end. A
// tile has TILE rows and TILE columns. Thread t returns the sum for row t % TILE and column
// t / TILE. The arguments `rows` and `columns` are the numbers of rows and columns from the
// beginning of the tile to the edges of the matrices.
//
// The block loads TILE_K terms of both matrices into shared memory at a time: left (row, k) and
// right (column, k). Each element in shared memory is read by TILE threads. Elements beyond the
// edges of the matrices are 0.
//
// If `left_along_k` is true, elements of `left` with neighbouring k are adjacent in global memory.
// If it is false, elements of `left` in neighbouring rows are adjacent. The argument
// `right_along_k` describes `right` and its columns in this way. So neighbouring threads can load
// adjacent elements. The function calls on_loaded(row, k, element) once for each element of `left`.
template <typename real, typename Left, typename Right, typename OnLoaded>
__device__ real tile_of_product(int rows, int columns, int begin, int end, Left left,
                                bool left_along_k, Right right, bool right_along_k, real* tiles,
                                OnLoaded on_loaded) {
    using Four = Vector<real, VECTOR>;
    constexpr int PITCH = TILE_K + VECTOR;  // Neighbouring rows begin in different banks.
    real *lefts = tiles, *rights = tiles + TILE * PITCH;
    real sums[VECTOR] = {};
    for (int start = begin; start < end; start += TILE_K) {
        const int depth = min(TILE_K, end - start);
        // A load beyond the edge reads an element at the edge, but 0 is stored instead.
        const auto load_tile = [&](int count, auto matrix, bool along_k, real* tile,
                                   auto on_loaded) {
            batched_load_store<TILE * TILE_K / THREADS, real>(
                TILE * TILE_K,
                [&](int t) {
                    const int k = along_k ? t % TILE_K : t / TILE;
                    const int i = along_k ? t / TILE_K : t % TILE;
                    return matrix(min(i, count - 1), start + min(k, depth - 1));
                },
                [&](int t, real result) {
                    const int k = along_k ? t % TILE_K : t / TILE;
                    const int i = along_k ? t / TILE_K : t % TILE;
                    const bool inside = i < count && k < depth;
                    tile[i * PITCH + k] = inside ? result : real(0);
                    if (inside) {
                        on_loaded(i, start + k, result);
                    }
                });
        };
        __syncthreads();  // All threads have finished reading the previous tiles.
        load_tile(rows, left, left_along_k, lefts, on_loaded);
        load_tile(columns, right, right_along_k, rights, [](int, int, real) {});
        __syncthreads();
        const Four* a = reinterpret_cast<const Four*>(lefts + threadIdx.x % TILE * PITCH);
        const Four* b = reinterpret_cast<const Four*>(rights + threadIdx.x / TILE * PITCH);
        for (int k = 0; k < (depth + VECTOR - 1) / VECTOR; ++k) {
            const Four x = a[k], w = b[k];
            for (int i = 0; i < VECTOR; ++i) {
                sums[i] += x.v[i] * w.v[i];
            }
        }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Computes the forward pass of the linear layer of S (`functional.linear`). The input x is the
// output of P:
//   y[n,o] = Σ_k x[n,k] w[o,k] + b[o]
// In training, the kernel also writes x, for the backward pass. If S has batch norm, the kernel
// also writes the statistics of each part of the batch. The pointers x, `means` and `squares` are
// null if the arrays are not needed.
//
// Grid: (parts of `examples_per_block` examples, tiles of TILE outputs).
// Reads: `before`, the y of P (example, channel, row, column), or the images if `before` is null;
// `weight`, w (output, input); `bias`, b (output), or null.
// Writes: y (example, output); x (example, input); `means` and `squares` (output, part).
template <typename real, typename P, typename S>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS<real>)
    linear_forward(P p, S s, int n, int examples_per_block, Batch batch, Norm<real> norm,
                   const real* __restrict__ before, const real* __restrict__ weight,
                   const real* __restrict__ bias, real* __restrict__ x, real* __restrict__ y,
                   Mean<real>* __restrict__ means, real* __restrict__ squares) {
    Memory<real> memory;
    const Input<real, P> input = input_of(p, normalization(p, n, norm, memory), before, batch);
    const int inputs = s.channels, begin = blockIdx.x * examples_per_block,
              end = min(begin + examples_per_block, n);
    const int first_map = blockIdx.y * TILE, o = first_map + threadIdx.x / TILE;
    for (int e = begin; e < end; e += TILE) {
        const int count = min(TILE, end - e), row = threadIdx.x % TILE;
        real value = tile_of_product<real>(
            count, s.maps - first_map, 0, inputs, [&](int i, int k) { return input(e + i, k); },
            true, [&](int i, int k) { return weight[(first_map + i) * inputs + k]; }, true,
            memory.free,
            [&](int i, int k, real result) {
                if (x != nullptr && first_map == 0) {
                    x[(e + i) * inputs + k] = result;
                }
            });
        value += bias == nullptr || o >= s.maps ? real(0) : bias[o];
        if (row < count && o < s.maps) {
            y[(e + row) * s.maps + o] = value;
        }
        if (means != nullptr) {
            const real mean = group_sum(row < count ? value : real(0), TILE) / count;
            const real d = row < count ? value - mean : real(0);
            real sums[] = {d, d * d};
            group_sums(sums, TILE);
            if (row == 0 && o < s.maps) {
                const int part = o * gridDim.x + blockIdx.x;
                merge(e - begin, count, mean, sums, means + part, squares + part);
            }
        }
    }
}

// Computes the backward pass of the linear layer of S (`functional.linear_backward`). The grid
// consists of two kinds of blocks.
//
// The first `input_blocks` blocks compute dx, the gradient with respect to the input of S:
//   dx[n,k] = Σ_o dy[n,o] w[o,k]
// These blocks use dx to compute the dz of P and the sums for the batch norm of P. If P is the
// images, `input_blocks` is 0.
//
// The other blocks compute dw and db, the gradients with respect to the weight and the bias. Each
// block computes a partial sum over `examples_per_weight_block` examples, and `sgd` adds the
// partial sums. The bias is treated as the weight of an additional input that is always 1:
//   dw[o,k] = Σ_n dy[n,o] x[n,k]
//
// Grid: `input_blocks` blocks (parts of `examples_per_block` examples × tiles of TILE inputs), then
// blocks (parts of `examples_per_weight_block` examples × tiles of TILE outputs × TILE inputs).
// Reads: x (example, input); y and dz (example, output); `weight`, w (output, input); `before`, the
// y of P (example, channel, row, column).
// Writes: `dz_before`, the dz of P, with the indices of `before`; `sums_before`, the sums for P's
// batch norm (kind, channel, part); the partial sums dw (part, output, input) and db (part,
// output). The pointer db is null if no gradient of the bias is needed. If `step` is not null, the
// kernel increments *step. No thread of this launch reads *step.
template <typename real, typename P, typename S>
__global__ void linear_backward(P p, S s, int n, int input_blocks, int examples_per_block,
                                int examples_per_weight_block, Norm<real> norm, Sums<real> sums,
                                Norm<real> norm_before, Sums<real> sums_before,
                                const real* __restrict__ before, const real* __restrict__ weight,
                                const real* __restrict__ x, const real* __restrict__ y,
                                const real* __restrict__ dz, real* __restrict__ dz_before,
                                real* __restrict__ dw, real* __restrict__ db, int* step) {
    Memory<real> memory;
    const Gradient<real> dy = gradient_of(s, n, norm, sums, y, dz, memory);
    const int inputs = s.channels, tiles = (inputs + TILE - 1) / TILE;
    const int row = threadIdx.x % TILE, column = threadIdx.x / TILE;
    if (blockIdx.x < input_blocks) {
        const Normalization<real> normalized = normalization(p, n, norm_before, memory);
        const int part = blockIdx.x / tiles, first = blockIdx.x % tiles * TILE;
        const int begin = part * examples_per_block, end = min(begin + examples_per_block, n),
                  k = first + column;
        real result[2] = {};
        for (int e = begin; e < end; e += TILE) {
            const real g = tile_of_product<real>(
                end - e, inputs - first, 0, s.maps,
                [&](int i, int o) { return dy(o, (e + i) * s.maps + o); }, true,
                [&](int i, int o) { return weight[o * inputs + first + i]; }, false, memory.free,
                [](int, int, real) {});
            if (e + row < end && k < inputs) {
                input_backward(p, normalized, before, e + row, k, g, dz_before, result);
            }
        }
        if (norm_before.gamma != nullptr) {
            group_sums(result, TILE);
            if (row == 0 && k < inputs) {
                // A channel of stage P has `area` of the inputs. Each block writes one partial sum
                // for each of them, at the index (block, position in the channel).
                const int area = inputs / p.maps;
                const int at = k / area * sums_before.parts + part * area + k % area;
                sums_before.sums[at] = result[0];
                sums_before.sums[p.maps * sums_before.parts + at] = result[1];
            }
        }
    } else {
        const int columns = inputs + (db != nullptr);
        const int across = (columns + TILE - 1) / TILE, down = (s.maps + TILE - 1) / TILE;
        const int tile = blockIdx.x - input_blocks, part = tile / (across * down);
        const int first_map = tile / across % down * TILE, first = tile % across * TILE;
        const int begin = part * examples_per_weight_block,
                  end = min(begin + examples_per_weight_block, n);
        const real value = tile_of_product<real>(
            s.maps - first_map, columns - first, begin, end,
            [&](int i, int e) { return dy(first_map + i, e * s.maps + first_map + i); }, false,
            [&](int i, int e) { return first + i == inputs ? real(1) : x[e * inputs + first + i]; },
            false, memory.free, [](int, int, real) {});
        const int o = first_map + row, k = first + column;
        if (o < s.maps && k < inputs) {
            dw[(part * s.maps + o) * inputs + k] = value;
        } else if (o < s.maps && k < columns) {
            db[part * s.maps + o] = value;
        }
    }
    if (step != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
        *step += 1;
    }
}

// ---------------------------------------------------------------------------------- convolutions

// The layout of the maps of one example in shared memory: (map, row, column). Each map is stored as
// a plane of `area` elements. A plane has `height` rows of `pitch` elements, of which `width` are
// used. The values of `pitch` and `area` are chosen such that neighbouring threads, which read at
// the same time, read from different banks where possible.
struct Planes {
    int height, width, pitch, area;
};

// Returns the smallest n for which n >= `number` and n - `like` is a multiple of `divisor`. The
// argument `divisor` is a power of two.
__device__ constexpr int raised(int number, int like, int divisor) {
    return number + ((like - number) & (divisor - 1));
}

// Returns the layout of the padded input of a convolution whose output maps have rows × columns
// elements. The height is sufficient for whole groups of ROWS_PER_THREAD rows of the output,
// because a thread computes such a group. The pitch is chosen so that the threads of one group of
// rows read from other banks than the threads of the next group.
__device__ constexpr Planes planes_read(int rows, int columns, int kernel_h, int kernel_w,
                                        int stride_h, int stride_w) {
    const int height =
        ((rows + ROWS_PER_THREAD - 1) / ROWS_PER_THREAD * ROWS_PER_THREAD - 1) * stride_h +
        kernel_h;
    const int width = (columns - 1) * stride_w + kernel_w;
    const int pitch =
        raised(width, (columns + ROWS_PER_THREAD - 1) / ROWS_PER_THREAD, BANKS / ROWS_PER_THREAD);
    return {height, width, pitch, height * pitch};
}

// Returns the layout of the padded input from which the gradient with respect to the weights of a
// convolution is computed. Each thread works on one channel and at most TAPS_PER_THREAD weights of
// one row of the convolution kernel.
// The area is chosen so that the threads of one channel read from other banks than the threads of
// the next channel.
__device__ constexpr Planes planes_summed(int rows, int columns, int kernel_h, int kernel_w,
                                          int stride_h, int stride_w) {
    const int height = (rows - 1) * stride_h + kernel_h;
    const int width = (columns - 1) * stride_w + kernel_w, pitch = width | 1;
    return {height, width, pitch, raised(height * pitch, kernel_h * pitch, BANKS)};
}

// Returns the layout of maps that are not padded. A map has `rows` rows and `columns` columns. The
// pitch is odd, so that neighbouring rows begin in different banks.
__device__ constexpr Planes planes_of_maps(int rows, int columns) {
    return {rows, columns, columns | 1, rows * (columns | 1)};
}

// Sets the `count` elements of all planes to 0. The padding is not written afterwards, so it stays
// 0. The function ends with a barrier.
template <typename real>
__device__ void clear(real* planes, int count) {
    for (int t = threadIdx.x; t < count; t += THREADS) {
        planes[t] = 0;
    }
    __syncthreads();
}

// Stores the maps of an example in the array `planes` (map, row, column), in the layout `layout`.
// Element t of the example, in the order (map, row, column), is load(t). An element at row i and
// column j of its map is stored in row `i * stride_h + above` and column `j * stride_w + left` of
// its plane. If this place is outside of the plane, the element is not stored. For each element,
// the function also calls on_loaded(t, element).
template <int IN_FLIGHT, typename real, typename Load, typename OnLoaded>
__device__ __forceinline__ void scatter(int maps, int rows, int columns, Planes layout,
                                        int stride_h, int stride_w, int above, int left,
                                        real* planes, Load load, OnLoaded on_loaded) {
    batched_load_store<IN_FLIGHT, real>(maps * rows * columns, load, [&](int t, real result) {
        const int map = t / (rows * columns);
        const int i = t / columns % rows * stride_h + above, j = t % columns * stride_w + left;
        if (0 <= i && i < layout.height && 0 <= j && j < layout.width) {
            planes[map * layout.area + i * layout.pitch + j] = result;
        }
        on_loaded(t, result);
    });
}

// Computes the output of a convolution from its padded input. This function also computes the
// gradient with respect to the input of a convolution, which has the same form:
//   out[o,p,q] = bias(o) + Σ_cij w(o,c,i,j) in[c, p·stride_h + i, q·stride_w + j]
// A thread computes ROWS_PER_THREAD rows of MAPS_PER_THREAD maps, so each element that it reads is
// used several times.
//
// Three arrays are in shared memory: `in` (channel, row, column) has the layout of `planes_read`,
// `out` has the indices (map, row, column), and `weights` has the indices (channel, kernel column,
// kernel row, map). The array `weights` contains the weights of `weight_channels` channels at a
// time. The function ends with a barrier, so the caller can read `out`.
template <typename real, typename Bias, typename Weight>
__device__ __forceinline__ void correlate(int channels, const real* in, int maps, int rows,
                                          int columns, int kernel_h, int kernel_w, int stride_h,
                                          int stride_w, Bias bias, Weight weight,
                                          int weight_channels, real* weights, real* out) {
    using Pair = Vector<real, MAPS_PER_THREAD>;
    const Planes layout = planes_read(rows, columns, kernel_h, kernel_w, stride_h, stride_w);
    const int pitch = layout.pitch, plane = layout.area;
    const int groups = (maps + MAPS_PER_THREAD - 1) / MAPS_PER_THREAD,
              row_groups = (rows + ROWS_PER_THREAD - 1) / ROWS_PER_THREAD;
    const int taps = kernel_h * kernel_w;
    for (int first = 0; first < channels; first += weight_channels) {
        const int count = min(weight_channels, channels - first);
        __syncthreads();  // All threads have finished reading the previous weights.
        batched_load_store<8, real>(
            count * taps * groups * MAPS_PER_THREAD,
            [&](int t) {
                const int o = t % (groups * MAPS_PER_THREAD),
                          tap = t / (groups * MAPS_PER_THREAD) % taps;
                const int c = first + t / (groups * MAPS_PER_THREAD * taps);
                // The loops below use the weights column by column, so this order is stored.
                return o < maps ? weight(o, c, tap % kernel_h, tap / kernel_h) : real(0);
            },
            [&](int t, real result) { weights[t] = result; });
        __syncthreads();
        for (int t = threadIdx.x; t < groups * row_groups * columns; t += THREADS) {
            const int q = t % columns, p = t / columns % row_groups * ROWS_PER_THREAD;
            const int group = t / (columns * row_groups);
            real sums[MAPS_PER_THREAD][ROWS_PER_THREAD];
            for (int m = 0; m < MAPS_PER_THREAD; ++m) {
                const int o = group * MAPS_PER_THREAD + m;
                for (int r = 0; r < ROWS_PER_THREAD; ++r) {
                    const bool begun = first > 0 && o < maps && p + r < rows;
                    sums[m][r] = begun ? out[(o * rows + p + r) * columns + q] : real(0);
                }
            }
            const real* corner = in + first * plane + p * stride_h * pitch + q * stride_w;
            const Pair* group_weights = reinterpret_cast<const Pair*>(weights) + group;
            for (int c = 0; c < count; ++c) {
                for (int j = 0; j < kernel_w; ++j) {
#pragma unroll
                    for (int i = 0; i < kernel_h; ++i) {
                        const Pair w = group_weights[((c * kernel_w + j) * kernel_h + i) * groups];
                        for (int r = 0; r < ROWS_PER_THREAD; ++r) {
                            const real v = corner[c * plane + (r * stride_h + i) * pitch + j];
                            for (int m = 0; m < MAPS_PER_THREAD; ++m) {
                                sums[m][r] += w.v[m] * v;
                            }
                        }
                    }
                }
            }
            for (int m = 0; m < MAPS_PER_THREAD; ++m) {
                const int o = group * MAPS_PER_THREAD + m;
                const real last = first + count == channels && o < maps ? bias(o) : real(0);
                for (int r = 0; r < ROWS_PER_THREAD; ++r) {
                    if (o < maps && p + r < rows) {
                        out[(o * rows + p + r) * columns + q] = sums[m][r] + last;
                    }
                }
            }
        }
    }
    __syncthreads();
}

// Computes the forward pass of the convolution of S (`functional.conv2d`). The input x is the
// output of P. The formula is written for the same stride and padding on both axes:
//   y[n,o,p,q] = b[o] + Σ_cij w[o,c,i,j] x[n, c, p·stride+i-padding, q·stride+j-padding]
// In training, the kernel also writes x, for the backward pass. If S has batch norm, the kernel
// also writes the statistics of each part of the batch. The pointers x, `means` and `squares` are
// null if the arrays are not needed. A block holds the maps of one example at a time in shared
// memory.
//
// Grid: (parts of `examples_per_block` examples).
// Reads: `before`, the y of P (example, channel, row, column), or the images if `before` is null;
// `weight`, w (map, channel, kernel row, kernel column); `bias`, b (map), or null.
// Writes: y (example, map, row, column); x (example, channel, row, column); `means` and `squares`
// (map, part).
template <typename real, typename P, typename S>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS<real>)
    conv_forward(P p, S s, int n, int examples_per_block, int weight_channels, Batch batch,
                 Norm<real> norm, const real* __restrict__ before, const real* __restrict__ weight,
                 const real* __restrict__ bias, real* __restrict__ x, real* __restrict__ y,
                 Mean<real>* __restrict__ means, real* __restrict__ squares) {
    Memory<real> memory;
    const Input<real, P> input = input_of(p, normalization(p, n, norm, memory), before, batch);
    const int pixels = s.channels * s.height * s.width, area = s.rows * s.columns;
    const Planes layout =
        planes_read(s.rows, s.columns, s.kernel_h, s.kernel_w, s.stride_h, s.stride_w);
    real* planes = memory.allocate(s.channels * layout.area);
    real* out = memory.allocate(s.maps * area);
    clear(planes, s.channels * layout.area);
    const int begin = blockIdx.x * examples_per_block, end = min(begin + examples_per_block, n);
    for (int e = begin; e < end; ++e) {
        scatter<4>(  // More loads at once do not help, because each `input` takes long to compute.
            s.channels, s.height, s.width, layout, 1, 1, s.padding_h, s.padding_w, planes,
            [&](int t) { return input(e, t); },
            [&](int t, real result) {
                if (x != nullptr) {
                    x[e * pixels + t] = result;
                }
            });
        correlate<real>(
            s.channels, planes, s.maps, s.rows, s.columns, s.kernel_h, s.kernel_w, s.stride_h,
            s.stride_w, [&](int o) { return bias == nullptr ? real(0) : bias[o]; },
            [&](int o, int c, int i, int j) {
                return weight[((o * s.channels + c) * s.kernel_h + i) * s.kernel_w + j];
            },
            weight_channels, memory.free, out);
        for (int t = threadIdx.x; t < s.maps * area; t += THREADS) {
            y[e * s.maps * area + t] = out[t];
        }
        if (means == nullptr) {
            continue;
        }
        const int group_size = threads_per_channel(s.maps), member = threadIdx.x % group_size;
        for (int first = 0; first < s.maps; first += THREADS / group_size) {
            const int o = first + threadIdx.x / group_size, last = o < s.maps ? area : 0;
            const real* map = out + o * area;
            real sum = 0, sums[2] = {};
            for (int t = member; t < last; t += group_size) {
                sum += map[t];
            }
            const real mean = group_sum(sum, group_size) / area;
            for (int t = member; t < last; t += group_size) {
                const real d = map[t] - mean;
                sums[0] += d;
                sums[1] += d * d;
            }
            group_sums(sums, group_size);
            if (member == 0 && o < s.maps) {
                const int part = o * gridDim.x + blockIdx.x;
                merge((e - begin) * area, area, mean, sums, means + part, squares + part);
            }
        }
    }
}

// Adds the gradient of one example with respect to the weights of a convolution
// (`functional.conv2d_backward`) to dw:
//   dw[o,c,i,j] += Σ_pq dy[o,p,q] x[c, p·stride_h + i, q·stride_w + j]
// If `first` is true, dw is set to this gradient, because this example is the first one. The array
// dw (map, channel, kernel row, kernel column) is in global memory. The other arrays are in shared
// memory: `planes` contains the padded x (channel, row, column), dy has the indices (map, row,
// column), and `sums` has room for the sums of all threads (map of a group, weight of a kernel row,
// thread).
//
// A group of weights consists of TAPS_PER_THREAD weights of one kernel row for MAPS_PER_THREAD
// maps. A thread computes a whole group, so the thread uses each element that it reads several
// times. If the block has at least twice as many threads as groups, `group_size` threads share a
// group. Each of these threads adds up some rows p.
template <typename real, typename S>
__device__ __forceinline__ void add_weight_gradient(S s, bool first, Planes layout,
                                                    const real* planes, Planes map_layout,
                                                    const real* dy, real* sums, real* dw) {
    const int across = (s.kernel_w + TAPS_PER_THREAD - 1) / TAPS_PER_THREAD,
              pairs = (s.maps + MAPS_PER_THREAD - 1) / MAPS_PER_THREAD;
    const int groups = pairs * s.channels * s.kernel_h * across;
    const int most = max(1, min(s.rows, THREADS / groups)), each = (s.rows + most - 1) / most;
    const int group_size = (s.rows + each - 1) / each, member = threadIdx.x % group_size;
    const int groups_at_once = THREADS / group_size;
    for (int start = 0; start < groups; start += groups_at_once) {
        const int own = threadIdx.x / group_size, group = start + own;
        real result[MAPS_PER_THREAD][TAPS_PER_THREAD] = {};
        if (own < groups_at_once && group < groups) {
            const int j = group % across * TAPS_PER_THREAD, i = group / across % s.kernel_h;
            const int c = group / (across * s.kernel_h) % s.channels;
            const int o = group / (across * s.kernel_h * s.channels) * MAPS_PER_THREAD;
            for (int p = member; p < s.rows; p += group_size) {
                const real* seen =
                    planes + c * layout.area + (p * s.stride_h + i) * layout.pitch + j;
                const real* above = dy + o * map_layout.area + p * map_layout.pitch;
#pragma unroll 8
                for (int q = 0; q < s.columns; ++q) {
                    for (int m = 0; m < MAPS_PER_THREAD; ++m) {
                        const real d = above[m * map_layout.area + q];
                        for (int t = 0; t < TAPS_PER_THREAD; ++t) {
                            result[m][t] += d * seen[q * s.stride_w + t];
                        }
                    }
                }
            }
        }
        __syncthreads();  // All threads have finished reading the previous sums.
        for (int m = 0; m < MAPS_PER_THREAD; ++m) {
            for (int t = 0; t < TAPS_PER_THREAD; ++t) {
                sums[(m * TAPS_PER_THREAD + t) * THREADS + threadIdx.x] = result[m][t];
            }
        }
        __syncthreads();
        for (int t = threadIdx.x; t < groups_at_once * MAPS_PER_THREAD * TAPS_PER_THREAD;
             t += THREADS) {
            const int m = t / TAPS_PER_THREAD % MAPS_PER_THREAD,
                      target = start + t / (MAPS_PER_THREAD * TAPS_PER_THREAD);
            const int j = target % across * TAPS_PER_THREAD + t % TAPS_PER_THREAD,
                      i = target / across % s.kernel_h;
            const int c = target / (across * s.kernel_h) % s.channels;
            const int o = target / (across * s.kernel_h * s.channels) * MAPS_PER_THREAD + m;
            if (target < groups && j < s.kernel_w && o < s.maps) {
                real* place = dw + ((o * s.channels + c) * s.kernel_h + i) * s.kernel_w + j;
                const real* parts = sums + t % (MAPS_PER_THREAD * TAPS_PER_THREAD) * THREADS +
                                    t / (MAPS_PER_THREAD * TAPS_PER_THREAD) * group_size;
                real sum = first ? real(0) : *place;
                for (int l = 0; l < group_size; ++l) {
                    sum += parts[l];
                }
                *place = sum;
            }
        }
    }
}

// Computes the backward pass of the convolution of S (`functional.conv2d_backward`). The grid
// consists of two kinds of blocks.
//
// The first `input_blocks` blocks compute dx, the gradient with respect to the input of S:
//   dx[n,c,h,w] = Σ_oij w[o,c,i,j] dy[n, o, (h+padding-i)/stride, (w+padding-j)/stride]
// The sum is over those i and j for which both quotients are integers and in range. The formula is
// written for the same stride and padding on both axes. This sum is a convolution with stride 1.
// Its kernel is w, rotated by 180°. Its input is dy, padded with zeros. Neighbouring elements of dy
// are separated by stride - 1 zeros. The blocks use dx to compute the dz of P and the sums
// for the batch norm of P. If P is the images, `input_blocks` is 0.
//
// The other blocks compute dw and db, the gradients with respect to the weight and the bias. Each
// block computes a partial sum over `examples_per_weight_block` examples, and `sgd` adds the
// partial sums.
//
// Grid: `input_blocks` blocks (parts of `examples_per_block` examples), then blocks (parts of
// `examples_per_weight_block` examples).
// Reads: x (example, channel, row, column); y and dz (example, map, row, column); `weight`, w (map,
// channel, kernel row, kernel column); `before`, the y of P (example, channel, row, column).
// Writes: `dz_before`, the dz of P, with the indices of `before`; `sums_before`, the sums for P's
// batch norm (kind, channel, part); the partial sums dw (part, map, channel, kernel row, kernel
// column) and db (part, map). The pointer db is null if no gradient of the bias is needed. If
// `step` is not null, the kernel increments *step. No thread of this launch reads *step.
template <typename real, typename P, typename S>
__global__ void conv_backward(P p, S s, int n, int input_blocks, int examples_per_block,
                              int examples_per_weight_block, int weight_channels, Norm<real> norm,
                              Sums<real> sums, Norm<real> norm_before, Sums<real> sums_before,
                              const real* __restrict__ before, const real* __restrict__ weight,
                              const real* __restrict__ x, const real* __restrict__ y,
                              const real* __restrict__ dz, real* __restrict__ dz_before,
                              real* __restrict__ dw, real* __restrict__ db, int* step) {
    Memory<real> memory;
    const Gradient<real> dy = gradient_of(s, n, norm, sums, y, dz, memory);
    const int area = s.rows * s.columns, seen = s.height * s.width;
    if (blockIdx.x < input_blocks) {
        const Normalization<real> normalized = normalization(p, n, norm_before, memory);
        const Planes layout = planes_read(s.height, s.width, s.kernel_h, s.kernel_w, 1, 1);
        real* planes = memory.allocate(s.maps * layout.area);
        real* dx = memory.allocate(s.channels * seen);
        clear(planes, s.maps * layout.area);
        const int begin = blockIdx.x * examples_per_block, end = min(begin + examples_per_block, n);
        for (int e = begin; e < end; ++e) {
            scatter<8>(
                s.maps, s.rows, s.columns, layout, s.stride_h, s.stride_w,
                s.kernel_h - 1 - s.padding_h, s.kernel_w - 1 - s.padding_w, planes,
                [&](int t) { return dy(t / area, e * s.maps * area + t); }, [](int, real) {});
            correlate<real>(
                s.maps, planes, s.channels, s.height, s.width, s.kernel_h, s.kernel_w, 1, 1,
                [](int) { return real(0); },
                [&](int c, int o, int i, int j) {
                    const int above = s.kernel_h - 1 - i, left = s.kernel_w - 1 - j;
                    return weight[((o * s.channels + c) * s.kernel_h + above) * s.kernel_w + left];
                },
                weight_channels, memory.free, dx);
            const int group_size = threads_per_channel(p.maps), member = threadIdx.x % group_size;
            const int items = s.channels * seen / p.maps;  // inputs of S from one channel of P
            for (int first = 0; first < p.maps; first += THREADS / group_size) {
                const int o = first + threadIdx.x / group_size, last = o < p.maps ? items : 0;
                real result[2] = {};
#pragma unroll 4
                for (int t = member; t < last; t += group_size) {
                    input_backward(p, normalized, before, e, o * items + t, dx[o * items + t],
                                   dz_before, result);
                }
                if (norm_before.gamma != nullptr) {
                    group_sums(result, group_size);
                    for (int k = 0; k < 2 && member == 0 && o < p.maps; ++k) {
                        real* sum =
                            sums_before.sums + (k * p.maps + o) * sums_before.parts + blockIdx.x;
                        *sum = result[k] + (e == begin ? real(0) : *sum);
                    }
                }
            }
        }
    } else {
        const int part = blockIdx.x - input_blocks, pixels = s.channels * seen;
        const Planes map_layout = planes_of_maps(s.rows, s.columns);
        const Planes layout =
            planes_summed(s.rows, s.columns, s.kernel_h, s.kernel_w, s.stride_h, s.stride_w);
        // Threads read up to TAPS_PER_THREAD elements after the last plane. The results are not
        // stored.
        real* planes = memory.allocate(s.channels * layout.area + TAPS_PER_THREAD);
        real* gradients = memory.allocate((s.maps + MAPS_PER_THREAD - 1) / MAPS_PER_THREAD *
                                          MAPS_PER_THREAD * map_layout.area);
        real* results = memory.allocate(MAPS_PER_THREAD * TAPS_PER_THREAD * THREADS);
        clear(planes, s.channels * layout.area);
        dw += part * s.maps * s.channels * s.kernel_h * s.kernel_w;
        const int begin = part * examples_per_weight_block,
                  end = min(begin + examples_per_weight_block, n);
        for (int e = begin; e < end; ++e) {
            scatter<8>(
                s.channels, s.height, s.width, layout, 1, 1, s.padding_h, s.padding_w, planes,
                [&](int t) { return x[e * pixels + t]; }, [](int, real) {});
            scatter<8>(
                s.maps, s.rows, s.columns, map_layout, 1, 1, 0, 0, gradients,
                [&](int t) { return dy(t / area, e * s.maps * area + t); }, [](int, real) {});
            __syncthreads();
            add_weight_gradient(s, e == begin, layout, planes, map_layout, gradients, results, dw);
            const int group_size = threads_per_channel(s.maps), member = threadIdx.x % group_size;
            for (int first = 0; db != nullptr && first < s.maps; first += THREADS / group_size) {
                const int o = first + threadIdx.x / group_size, last = o < s.maps ? area : 0;
                real sum = 0;
                for (int t = member; t < last; t += group_size) {
                    const int place = t / s.columns * map_layout.pitch + t % s.columns;
                    sum += gradients[o * map_layout.area + place];
                }
                sum = group_sum(sum, group_size);
                if (member == 0 && o < s.maps) {
                    real* all = db + part * s.maps + o;
                    *all = sum + (e == begin ? real(0) : *all);
                }
            }
            if (db != nullptr) {
                __syncthreads();  // All threads have finished reading `gradients`.
            }
        }
    }
    if (step != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
        *step += 1;
    }
}

// -------------------------------------------------------------------------- loss and optimization

// Computes softmax cross-entropy of one example in one thread (`functional.softmax_cross_entropy`).
// Returns the loss, which is NaN if the label is out of range. The array z contains the logits of
// the example, one for each class. The function replaces the logits by the gradient of the mean
// loss of the n examples of the batch. Here, p[k] is the probability of class k, and [k = label] is
// 1 if k is the label, else 0:
//   dlogits[k] = (p[k] - [k = label]) / n
// Sets *right to 1 if the largest logit is at the label, else to 0. If several logits are equal,
// the first one counts as the largest.
template <typename real>
__device__ real softmax_loss(real* z, int classes, int label, int n, int* right) {
    int largest = 0;
    for (int k = 1; k < classes; ++k) {
        if (z[k] > z[largest]) {
            largest = k;
        }
    }
    const real top = z[largest];
    const bool known = 0 <= label && label < classes;
    const real at_label = known ? z[label] : real(nan(""));
    *right = largest == label;
    real sum = 0;
    for (int k = 0; k < classes; ++k) {
        z[k] = exp(z[k] - top);
        sum += z[k];
    }
    for (int k = 0; k < classes; ++k) {
        z[k] = (z[k] / sum - (k == label ? 1 : 0)) / n;
    }
    return top - at_label + log(sum);
}

// Returns the label of example e of the batch.
__device__ inline int label_of(const Batch& batch, int e) {
    const int place = *batch.step * batch.stride + e;
    return batch.labels[batch.order == nullptr ? place : batch.order[place]];
}

// Writes the losses and the numbers of right predictions of a block. Each thread passes the loss
// and the number of right predictions of its own examples. The function adds up these values over
// each group of TILE threads, and writes one sum for each group to the arrays `losses` and
// `correct` (step, group). The sum of a row of `losses` is the mean loss of the n examples of the
// batch. The sum of a row of `correct` is the number of right predictions.
template <typename real>
__device__ void store_results(int n, const Batch& batch, real loss, int right, real* losses,
                              int* correct) {
    loss = group_sum(loss, TILE);
    right = group_sum(right, TILE);
    if (threadIdx.x % TILE == 0) {
        const int block = *batch.step * gridDim.x + blockIdx.x;
        const int at = block * (THREADS / TILE) + threadIdx.x / TILE;
        losses[at] = loss / n;
        correct[at] = right;
    }
}

// Computes the last linear layer, the loss, and the backward passes of both. The layer, S, must
// have no batch norm, no activation and no pooling. P must be a stage, not the images: the
// input x of the layer is the output of P:
//   logits[n,o] = Σ_k x[n,k] w[o,k] + b[o]
//   dx[n,k] = Σ_o dlogits[n,o] w[o,k]
//   dw[o,k] = Σ_n dlogits[n,o] x[n,k],   db[o] = Σ_n dlogits[n,o]
// The backward passes are computed only in training, when the pointer `dz_before` is not null.
//
// Grid: (parts of `examples_per_block` examples). A part may be empty. A block computes TILE
// examples at a time.
// Reads: `before`, the y of P (example, channel, row, column); `weight`, w (class, input); `bias`,
// b (class), or null; the labels.
// Writes: `losses` and `correct` (step, group), by `store_results`. In training, the kernel also
// writes `dz_before`, the dz of P, with the indices of `before`; `sums_before`, the sums for P's
// batch norm (kind, channel, part); the partial sums dw (part, class, input) and db (part, class).
// A block without examples writes no partial sums. The pointer db is null if the layer has no bias.
template <typename real, typename P, typename S>
__global__ void linear_cross_entropy(P p, S s, int n, int examples_per_block, Batch batch,
                                     Norm<real> norm_before, Sums<real> sums_before,
                                     const real* __restrict__ before,
                                     const real* __restrict__ weight, const real* __restrict__ bias,
                                     real* __restrict__ dz_before, real* __restrict__ dw,
                                     real* __restrict__ db, real* __restrict__ losses,
                                     int* __restrict__ correct) {
    Memory<real> memory;
    const Normalization<real> normalized = normalization(p, n, norm_before, memory);
    const Input<real, P> input = input_of(p, normalized, before, batch);
    const int inputs = s.channels, classes = s.maps;
    // The pitch is odd, so that neighbouring rows begin in different banks.
    const int pitch = inputs | 1;
    real* x = memory.allocate(TILE * pitch);         // (example, input)
    real* w = memory.allocate(classes * pitch);      // (class, input)
    real* logits = memory.allocate(TILE * classes);  // (example, class); later dlogits
    const int begin = blockIdx.x * examples_per_block, end = min(begin + examples_per_block, n);
    batched_load_store<8, real>(
        classes * inputs, [&](int t) { return weight[t]; },
        [&](int t, real result) { w[t / inputs * pitch + t % inputs] = result; });
    real loss = 0;
    int right = 0;
    for (int first = begin; first < end; first += TILE) {
        const int count = min(TILE, end - first);
        const bool begun = first > begin;  // whether this block has written partial sums already
        __syncthreads();  // All threads have finished reading the previous `x` and `logits`.
        batched_load_store<4, real>(
            count * inputs, [&](int t) { return input(first + t / inputs, t % inputs); },
            [&](int t, real result) { x[t / inputs * pitch + t % inputs] = result; });
        __syncthreads();
        for (int t = threadIdx.x; t < count * classes; t += THREADS) {
            const int e = t / classes, o = t % classes;
            real sum = bias == nullptr ? real(0) : bias[o];
            for (int k = 0; k < inputs; ++k) {
                sum += x[e * pitch + k] * w[o * pitch + k];
            }
            logits[t] = sum;
        }
        __syncthreads();
        if (threadIdx.x < count) {
            int hit;
            const int label = label_of(batch, first + threadIdx.x);
            loss += softmax_loss(logits + threadIdx.x * classes, classes, label, n, &hit);
            right += hit;
        }
        if (dz_before == nullptr) {
            continue;
        }
        __syncthreads();
        const int row = threadIdx.x % TILE;
        for (int column = 0; column < inputs; column += THREADS / TILE) {
            const int k = column + threadIdx.x / TILE;
            real result[2] = {};
            if (row < count && k < inputs) {
                real g = 0;
                for (int o = 0; o < classes; ++o) {
                    g += logits[row * classes + o] * w[o * pitch + k];
                }
                input_backward(p, normalized, before, first + row, k, g, dz_before, result);
            }
            if (norm_before.gamma != nullptr) {
                group_sums(result, TILE);
                // A channel of stage P has `area` of the inputs. Each block writes one partial sum
                // for each of them, at the index (block, position in the channel).
                const int area = inputs / p.maps;
                const int at = k / area * sums_before.parts + blockIdx.x * area + k % area;
                for (int i = 0; i < 2 && row == 0 && k < inputs; ++i) {
                    real* sum = sums_before.sums + i * p.maps * sums_before.parts + at;
                    *sum = result[i] + (begun ? *sum : real(0));
                }
            }
        }
        const int columns = inputs + (db != nullptr);  // The last column is the bias.
        for (int t = threadIdx.x; t < classes * columns; t += THREADS) {
            const int o = t / columns, k = t % columns;
            real* place = k < inputs ? dw + (blockIdx.x * classes + o) * inputs + k
                                     : db + blockIdx.x * classes + o;
            real sum = begun ? *place : real(0);
            for (int e = 0; e < count; ++e) {
                sum += logits[e * classes + o] * (k < inputs ? x[e * pitch + k] : real(1));
            }
            *place = sum;
        }
    }
    store_results(n, batch, loss, right, losses, correct);
}

// Computes softmax cross-entropy (`functional.softmax_cross_entropy`) of the output of P, and its
// backward pass. Here, P is the last stage of the network. The backward pass is computed only in
// training, when the pointer dz is not null. A thread computes the loss of one example.
//
// Grid: (parts of `examples_per_block` examples). `examples_per_block` is at most THREADS. A part
// may be empty.
// Reads: y, the y of P (example, channel, row, column); the labels.
// Writes: `losses` and `correct` (step, group), by `store_results`. In training, the kernel also
// writes the dz of P, with the indices of y, and `sums`, the sums for P's batch norm (kind,
// channel, part).
template <typename real, typename P>
__global__ void cross_entropy(P p, int n, int examples_per_block, Batch batch, Norm<real> norm,
                              Sums<real> sums, const real* __restrict__ y, real* __restrict__ dz,
                              real* __restrict__ losses, int* __restrict__ correct) {
    Memory<real> memory;
    const Normalization<real> normalized = normalization(p, n, norm, memory);
    const Input<real, P> input = input_of(p, normalized, y, batch);
    const int classes = p.maps * (p.rows / p.window_h) * (p.columns / p.window_w);
    // (example, class); later dlogits, the gradient with respect to the logits
    real* logits = memory.allocate(examples_per_block * classes);
    const int begin = blockIdx.x * examples_per_block,
              count = max(0, min(examples_per_block, n - begin));
    for (int t = threadIdx.x; t < count * classes; t += THREADS) {
        logits[t] = input(begin + t / classes, t % classes);
    }
    __syncthreads();
    real loss = 0;
    int right = 0;
    if (threadIdx.x < count) {
        const int label = label_of(batch, begin + threadIdx.x);
        loss = softmax_loss(logits + threadIdx.x * classes, classes, label, n, &right);
    }
    store_results(n, batch, loss, right, losses, correct);
    if (dz == nullptr) {
        return;
    }
    __syncthreads();
    const int group_size = threads_per_channel(p.maps), member = threadIdx.x % group_size,
              items = classes / p.maps;
    for (int first = 0; first < p.maps; first += THREADS / group_size) {
        const int o = first + threadIdx.x / group_size, last = o < p.maps ? count * items : 0;
        real result[2] = {};
        for (int t = member; t < last; t += group_size) {
            const int e = t / items, k = o * items + t % items;
            input_backward(p, normalized, y, begin + e, k, logits[e * classes + k], dz, result);
        }
        if (norm.gamma != nullptr) {
            group_sums(result, group_size);
            if (member == 0 && o < p.maps) {
                sums.sums[o * sums.parts + blockIdx.x] = result[0];
                sums.sums[(p.maps + o) * sums.parts + blockIdx.x] = result[1];
            }
        }
    }
}

// Adds the partial sums of all gradients, and computes a step of `optim.SGD` for all parameters.
// For a parameter w with the gradient g and the velocity v:
//   v ← momentum · v + (g + weight_decay · w),   w ← w - rate · v
// Weight decay applies only to the tensors for which `Tensor::decays` is 1.
//
// Grid: (ranges of PARAMETERS_PER_BLOCK parameters). THREADS_PER_PARAMETER threads add the partial
// sums of one parameter. Reads: `tensors`, the table of the parameter tensors in the order of their
// offsets (tensor); `partials`, for each tensor its partial sums (partial sum, parameter); `rates`,
// the learning rates (step). The kernel runs after *step has been incremented, so the rate of this
// step is rates[*step - 1]. Updates: `parameters`, `gradients` and `velocities`, each with `size`
// elements.
template <typename real>
__global__ void sgd(const Tensor* __restrict__ tensors, int size, const real* __restrict__ partials,
                    const int* step, const real* rates, real momentum, real weight_decay,
                    real* __restrict__ parameters, real* __restrict__ gradients,
                    real* __restrict__ velocities) {
    constexpr int THREADS_PER_PARAMETER = THREADS / PARAMETERS_PER_BLOCK;
    real* sums = reinterpret_cast<real*>(shared_memory);  // (thread of a parameter, parameter)
    const int at = blockIdx.x * PARAMETERS_PER_BLOCK + threadIdx.x % PARAMETERS_PER_BLOCK,
              member = threadIdx.x / PARAMETERS_PER_BLOCK;
    const Tensor* own = tensors;
    while (at >= own->offset + own->size && at < size) {
        ++own;
    }
    const Tensor t = *own;
    real sum = 0;
    if (at < size) {
        // Unrolling lets a thread start 16 loads together. The order of the additions is unchanged.
#pragma unroll 16
        for (int b = member; b < t.partials; b += THREADS_PER_PARAMETER) {
            sum += partials[t.partial_offset + b * t.size + at - t.offset];
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (member == 0 && at < size) {
        for (int l = 1; l < THREADS_PER_PARAMETER; ++l) {
            sum += sums[l * PARAMETERS_PER_BLOCK + threadIdx.x];
        }
        const real g = t.partials == 0 ? gradients[at] : sum;
        gradients[at] = g;
        real v = t.decays ? g + weight_decay * parameters[at] : g;
        v += momentum * velocities[at];
        velocities[at] = v;
        parameters[at] -= rates[*step - 1] * v;
    }
}
