// The kernels of a training step and of an evaluation; `launch.py` has their order.
//
// `npbn/functional` has the formulas that they compute, with derivations; the names are the same
// here. `real` is float or double. NVRTC compiles this file for the GPU; g++ compiles it for tests
// without a GPU, behind `tests/engine/cuda_shim.h`.
//
// Stages. A stage of the plan is an affine map (convolution or linear), y = A x + b, followed by
// batch norm, activation and pooling, each of which may be missing. A launch costs about as much
// time as the arithmetic of a stage, so a step has few launches. A kernel ends only where a sum
// over the whole batch is needed (at the end of each stage), before and after the loss, and before
// SGD. These boundaries are not those of the layers:
//
// - A forward kernel reads the y of the stage *before* it. It merges the batch statistics of that
//   y, normalizes, activates and pools while it reads, and writes the y of its own stage.
// - A backward kernel reads the gradient with respect to the output of batch norm, dz, and writes
//   the dz of the stage before.
//
//     y0 → [ norm, activation, pooling · affine map ] → y1 → [ ... ] → y2 → ... → loss
//     dz0 ← [ pooling', activation' · affine map' · norm' ] ← dz1 ← [ ... ] ← dz2 ← ... ← dlogits
//
// Below, S is the stage whose affine map a kernel computes, and P is the stage before it. For the
// first stage, P is the images: a stage with nothing in it.
//
// Launches. "Block" is CUDA's word: THREADS threads in one dimension. Convolutions are divided by
// examples: a block has the maps of one example in shared memory at a time, and processes
// `examples_per_block` examples. Linear layers are divided into tiles of TILE × TILE numbers. No
// kernel allocates memory, waits for the host, or needs a number that the host must read first. So
// a sequence of launches can be captured in a CUDA graph and replayed. Only a counter in memory
// changes from step to step.
//
// Reproducibility. The launch fixes the order of every sum: first the terms of a thread, then the
// threads of a block by number, then the blocks by number. There are no atomics.
//
// Bytes. "Moves" in the comments below lists what must be read from memory, or written to it, at
// least once. Numbers between two kernels stay in the second-level cache unless the batch is very
// large.

constexpr int THREADS = 256;
constexpr int TILE = 16;            // rows and columns of a product that a block computes at a time
constexpr int TILE_K = 128;         // terms of a product's sums in shared memory at a time
constexpr int VECTOR = 4;           // numbers that a thread reads from shared memory at once
constexpr int ROWS_PER_THREAD = 4;  // rows of a convolution's output that a thread computes
constexpr int MAPS_PER_THREAD = 2;  // maps of which it computes these rows
constexpr int TAPS_PER_THREAD = 5;  // weights of a kernel's row whose gradients a thread computes
constexpr int BANKS = 32;           // of shared memory; neighbours lie in neighbouring banks
constexpr int PARAMETERS_PER_BLOCK = 32;  // that a block of `sgd` updates

// __launch_bounds__ of the forward kernels: the least number of blocks that a multiprocessor must
// have room for. It is low, so that each thread gets many registers and can have many loads in
// flight.
template <typename real>
constexpr int MIN_BLOCKS = sizeof(real) == 4 ? 2 : 1;

// The sizes of a stage, known at run time.
struct Shape {
    int channels, height, width;                                       // of x: (C, H, W)
    int maps, rows, columns;                                           // of y: (O, H', W')
    int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;  // from x to y
    int window_h, window_w;  // pooling windows, which do not overlap
    int maximum;             // 1: maximum pooling; 0: average pooling
    int activation;          // SIGMOID, RELU or 0
};

// The sizes of a stage, known at compile time: divisions by them become multiplications, and loops
// over them are unrolled. Kernels take either kind for S and P.
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

constexpr int SIGMOID = 1, RELU = 2;  // values of `activation`; 0: none

// The batch. Its example e is example order[i] of the data set, or i if order is null, where
// i = *step · stride + e.
struct Batch {
    const unsigned char* images;
    const int *labels, *order, *step;
    int stride;
};

// Batch norm of a stage; gamma is null if the stage has none.
//
// In a forward kernel in training, `means` and `squares` hold the statistics of each part of the
// batch, as the kernel that computed y left them: means[o, part] is the mean of channel o over the
// part's examples (`examples_per_part`; the last part may have fewer), squares[o, part] the sum of
// squared distances from it. In the backward pass and in prediction, `means` is null, and `mean`
// and `var` are given.
//
// The mean is stored as an unevaluated sum, mean + rest, to survive large means: see "Rounding" in
// `functional/batch_norm.py`. In prediction, rest is null.
template <typename real>
struct Norm {
    const real *gamma, *beta;
    const double* means;
    const real* squares;
    real *mean, *rest, *var, *moving_mean, *moving_var;
    int parts, examples_per_part;
    real eps, momentum;
};

// What the backward pass of batch norm needs as well. For each channel o and part of the batch:
// sums[0, o, part] = Σ dz, the terms of dβ, and sums[1, o, part] = Σ dz (y - μ), the terms of s·dγ.
template <typename real>
struct Sums {
    real* sums;
    int parts;
    real *dgamma, *dbeta;
};

// A parameter tensor, for `sgd`: its offset and size in the arrays of all parameters; the offset
// and number of the partial sums of its gradient (0: the gradient is complete already); whether
// weight decay applies to it.
struct Tensor {
    int offset, size, partial_offset, partials, decays;
};

// ------------------------------------------------------------------ what the kernels are made of

alignas(32) extern __shared__ double shared_memory[];

// The shared memory of a block, which `allocate` divides among arrays.
template <typename real>
struct Memory {
    real* free = reinterpret_cast<real*>(shared_memory);

    __device__ real* allocate(int count) {
        real* allocated = free;
        free += (count + VECTOR - 1) / VECTOR * VECTOR;  // keep vectors aligned
        return allocated;
    }
};

template <typename real, int COUNT>
struct alignas(COUNT * sizeof(real)) Vector {
    real v[COUNT];
};

// Calls store(t, load(t)) for 0 <= t < count, divided among the threads of the block. A load from
// global memory takes hundreds of cycles, and the compiler must assume that a store changes what
// later loads read. So each thread starts IN_FLIGHT loads before it stores anything. Out-of-range
// threads reload the last element, because a branch would serialize the loads.
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

// All-reduce within groups of `group_size` consecutive threads: each thread gets the sums of the
// values of its group. `group_size` is a power of two and at most 32, so a group lies in a warp.
// All threads of the block must call this function together. It does not synchronize shared memory.
template <int COUNT, typename T>
__device__ void group_sums(T (&values)[COUNT], int group_size) {
    for (int distance = group_size / 2; distance > 0; distance /= 2) {
        for (int k = 0; k < COUNT; ++k) {
            values[k] += __shfl_xor_sync(0xffffffffu, values[k], distance);
        }
    }
}

template <typename T>
__device__ T group_sum(T value, int group_size) {
    T values[] = {value};
    group_sums(values, group_size);
    return values[0];
}

// The number of consecutive threads that work on each channel when a block's threads are divided
// among all channels.
__device__ constexpr int threads_per_channel(int channels) {
    int group_size = 32;
    while (group_size > 1 && group_size * channels > THREADS) {
        group_size /= 2;
    }
    return group_size;
}

template <typename real>
__device__ real activated(int activation, real z) {
    if (activation == SIGMOID) {
        return 1 / (1 + exp(-z));
    }
    return activation == RELU && z <= 0 ? real(0) : z;
}

// The derivative of the activation, as a function of its output a.
template <typename real>
__device__ real activation_derivative(int activation, real a) {
    if (activation == SIGMOID) {
        return a * (1 - a);
    }
    return activation == RELU && a == 0 ? real(0) : real(1);
}

// Batch norm of each channel, in shared memory: z = (y - mean - rest) · scale + beta.
template <typename real>
struct Normalization {
    real *mean, *rest, *scale, *beta;

    __device__ real centred(int o, real y) const { return y - mean[o] - rest[o]; }
    __device__ real operator()(int o, real y) const { return centred(o, y) * scale[o] + beta[o]; }
};

// Returns the normalization of stage P. In training, it first merges the statistics of the parts:
//   μ = Σ_t m_t μ_t / m,   m v = Σ_t (q_t + m_t (μ_t - μ)²)
// (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
// variances", 1979, (2.1b) for several parts). One pass is enough, in double precision and with the
// first part's mean μ_0 as pivot: the last sum is Σ_t (q_t + m_t (μ_t - μ_0)²) - m (μ - μ_0)².
// Every block merges, which costs less than another launch. The first block writes μ and v to
// `mean`, `rest` and `var`, and updates the moving averages.
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
            const double* means = norm.means + o * norm.parts;
            const double pivot = end > 0 ? means[0] : 0;
            double sums[2] = {};  // Σ m_t (μ_t - pivot), and Σ (q_t + m_t (μ_t - pivot)²)
#pragma unroll 8  // so many loads under way at a time; what they load_tile is still added in order
            for (int t = member; t < end; t += group_size) {
                const double m =
                    double(area) * min(norm.examples_per_part, n - t * norm.examples_per_part);
                const double d = means[t] - pivot;
                sums[0] += m * d;
                sums[1] += norm.squares[o * norm.parts + t] + m * d * d;
            }
            group_sums(sums, group_size);
            const double m = double(area) * n, d = sums[0] / m, mu = pivot + d;
            var = sums[1] / m - d * d;
            mean = mu;
            rest = mu - mean;
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

// Returns where in y the pooling window of output `item` begins; `item` counts the numbers of an
// example's output (C, H, W) after pooling. Sets *channel to its channel.
template <typename P>
__device__ int window_of(P p, int e, int item, int* channel) {
    const int columns = p.columns / p.window_w, rows = p.rows / p.window_h;
    const int q = item % columns, r = item / columns % rows;
    *channel = item / (columns * rows);
    return ((e * p.maps + *channel) * p.rows + r * p.window_h) * p.columns + q * p.window_w;
}

// Returns the largest activation in a pooling window, and sets *chosen to its place: the first of
// equal ones. NaN counts as larger than any number.
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

// The input of a stage, as a function: (e, item) → number `item` of example e, computed from the y
// of stage P. If y is null, P is the images: a pixel / 255.
template <typename real, typename P>
struct Input {
    P p;
    Normalization<real> normalized;
    const real* y;
    Batch batch;
    int first;  // index in `order` of the first example

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

template <typename real, typename P>
__device__ Input<real, P> input_of(P p, const Normalization<real>& normalized, const real* y,
                                   const Batch& batch) {
    return {p, normalized, y, batch, y == nullptr ? *batch.step * batch.stride : 0};
}

// Backward through pooling and activation: from g, the gradient with respect to an output of
// `Input`, to dz, the gradient with respect to the output of batch norm. Recomputes activations
// from y. Adds dz and dz (y - μ) to the sums that the backward pass of batch norm needs.
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

// The gradient with respect to y, through batch norm (`functional.batch_norm_backward`), as a
// function of channel o and place in y. m is the number of values of a channel.
//   dy = γ/s (dz - dβ/m - (y - μ) dγ/(s m)),   dβ = Σ dz,   dγ = Σ dz (y - μ) / s
// Without batch norm, dy = dz.
template <typename real>
struct Gradient {
    const real *y, *dz;
    Normalization<real> normalized;
    real *shift, *factor;  // dβ/m and dγ/(s m)
    bool norm;

    __device__ real operator()(int o, int at) const {
        if (!norm) {
            return dz[at];
        }
        return normalized.scale[o] * (dz[at] - shift[o] - normalized.centred(o, y[at]) * factor[o]);
    }
};

// Returns the gradient of stage S; the caller must synchronize before it is used. The first block
// writes dβ and dγ.
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

// Merges `count` new values of a channel into the statistics of its part of the batch, which cover
// `had` values (Chan et al., (2.1)). `mean` is the mean of the new values, up to rounding; `sums`
// are the sums of their distances from it and of the squared distances, which correct for that
// rounding.
template <typename real>
__device__ void merge(int had, int count, real mean, const real (&sums)[2], double* part_mean,
                      real* part_squares) {
    const double rest = sums[0] / count, squares = sums[1] - sums[0] * rest;
    const double d = mean + rest - (had == 0 ? 0 : *part_mean);
    const double weight = count / double(had + count);
    *part_mean = had == 0 ? d : *part_mean + d * weight;
    *part_squares = had == 0 ? squares : *part_squares + squares + d * d * had * weight;
}

// ------------------------------------------------------------------------------- matrix products

// Computes one tile of a matrix product in a block: Σ_k left(row, k) right(column, k), begin <= k <
// end, for TILE rows and TILE columns. Thread t returns row t % TILE, column t / TILE. TILE_K terms
// at a time are loaded into shared memory, where TILE threads read each number; outside of the
// matrices it is 0. `left_along_k` and `right_along_k` say which numbers are neighbours in memory,
// those with neighbouring k or those of neighbouring rows, so that neighbouring threads load
// neighbours. Calls on_loaded(row, k, number) once for each number of the left matrix.
template <typename real, typename Left, typename Right, typename OnLoaded>
__device__ real tile_of_product(int rows, int columns, int begin, int end, Left left,
                                bool left_along_k, Right right, bool right_along_k, real* tiles,
                                OnLoaded on_loaded) {
    using Four = Vector<real, VECTOR>;
    constexpr int PITCH = TILE_K + VECTOR;  // neighbouring rows begin in different banks
    real *lefts = tiles, *rights = tiles + TILE * PITCH;
    real sums[VECTOR] = {};
    for (int start = begin; start < end; start += TILE_K) {
        const int depth = min(TILE_K, end - start);
        // Out-of-range loads read a number at the edge, which is then stored as 0.
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
        __syncthreads();  // the last tile has been read
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

// A linear layer (`functional.linear`): y[n,o] = Σ_k x[n,k] w[o,k] + b, where x is the output of
// stage P. Writes y and the statistics of this part of the batch; also x, for the backward pass,
// unless it is null.
//
// Launch: grid (parts of `examples_per_block` examples, tiles of TILE outputs). Moves P's y and w
// in, y and x out.
template <typename real, typename P, typename S>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS<real>)
    linear_forward(P p, S s, int n, int examples_per_block, Batch batch, Norm<real> norm,
                   const real* __restrict__ before, const real* __restrict__ weight,
                   const real* __restrict__ bias, real* __restrict__ x, real* __restrict__ y,
                   double* __restrict__ means, real* __restrict__ squares) {
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

// The backward pass of a linear layer (`functional.linear_backward`), from its dz to the dz of
// stage P.
//
// The first `input_blocks` blocks (none, if P is the images) compute the gradient with respect to
// the input, then P's dz and the sums for its batch norm:
//   dx[n,k] = Σ_o dy[n,o] w[o,k]
// The others compute the gradients with respect to the parameters, in parts of
// `examples_per_weight_block` examples, which `sgd` adds up. The bias is treated as the weight of
// an input that is always 1:
//   dw[o,k] = Σ_n dy[n,o] x[n,k]
//
// Launch: a grid of the input blocks (tiles of TILE inputs by parts of `examples_per_block`
// examples), then the others (tiles of outputs × inputs by parts of the batch). Moves x, y, dz, w
// and P's y in; P's dz and the partial sums out. Increments *step unless it is null; no other
// thread reads it in this launch.
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
                const int area = inputs / p.maps;  // each input of a channel is one of its parts
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

// The layout of an example's maps in shared memory, "planes". Rows and planes are padded so that
// what neighbouring threads read at the same time lies in different banks where possible.
struct Planes {
    int height, width, pitch, area;
};

// The smallest n >= number with n ≡ like (mod divisor); divisor is a power of two.
__device__ constexpr int raised(int number, int like, int divisor) {
    return number + ((like - number) & (divisor - 1));
}

// The planes that a convolution with outputs of rows × columns reads. A thread computes
// ROWS_PER_THREAD rows: the banks that the threads of one group of rows read end where those of the
// next group begin.
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

// The planes that the gradient with respect to the weights reads, with threads for each row of the
// kernel and each channel: the banks that the rows of one channel occupy end where those of the
// next begin.
__device__ constexpr Planes planes_summed(int rows, int columns, int kernel_h, int kernel_w,
                                          int stride_h, int stride_w) {
    const int height = (rows - 1) * stride_h + kernel_h;
    const int width = (columns - 1) * stride_w + kernel_w, pitch = width | 1;
    return {height, width, pitch, raised(height * pitch, kernel_h * pitch, BANKS)};
}

__device__ constexpr Planes planes_of_maps(int rows, int columns) {
    return {rows, columns, columns | 1, rows * (columns | 1)};
}

// Fills with zeros. What is not written afterwards, the padding, keeps them.
template <typename real>
__device__ void clear(real* planes, int count) {
    for (int t = threadIdx.x; t < count; t += THREADS) {
        planes[t] = 0;
    }
    __syncthreads();
}

// Stores an example's maps in planes: number t, load(t), at (i, j) of its map goes to
// (i · stride_h + above, j · stride_w + left), unless that is outside of the plane. Then calls
// on_loaded(t, load(t)).
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

// The sum in convolution and in its gradient with respect to the input:
//   out[o,p,q] = bias(o) + Σ_cij w(o,c,i,j) in[c, p·stride_h + i, q·stride_w + j]
// `in` and `out` are in shared memory, and so are the weights of `weight_channels` channels at a
// time, with the weights of neighbouring maps next to one another. A thread computes
// ROWS_PER_THREAD rows of MAPS_PER_THREAD maps, so that it uses each number it reads several times.
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
        __syncthreads();  // the weights before have been read
        batched_load_store<8, real>(
            count * taps * groups * MAPS_PER_THREAD,
            [&](int t) {
                const int o = t % (groups * MAPS_PER_THREAD),
                          tap = t / (groups * MAPS_PER_THREAD) % taps;
                const int c = first + t / (groups * MAPS_PER_THREAD * taps);
                // Column by column of the kernel, the order in which they are used.
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

// A convolution (`functional.conv2d`), where x is the output of stage P:
//   y[n,o,p,q] = b[o] + Σ_cij w[o,c,i,j] x[n, c, p·s+i-pad, q·s+j-pad]
// Writes y and the statistics of this part of the batch; also x, for the backward pass, unless it
// is null.
//
// Launch: grid (parts of `examples_per_block` examples). Moves P's y (or the images) and w in, y
// and x out.
template <typename real, typename P, typename S>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS<real>)
    conv_forward(P p, S s, int n, int examples_per_block, int weight_channels, Batch batch,
                 Norm<real> norm, const real* __restrict__ before, const real* __restrict__ weight,
                 const real* __restrict__ bias, real* __restrict__ x, real* __restrict__ y,
                 double* __restrict__ means, real* __restrict__ squares) {
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
        scatter<4>(  // not more: each number takes long to compute
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

// Adds one example's gradient with respect to the weights (`functional.conv2d_backward`):
//   dw[o,c,i,j] += Σ_pq dy[o,p,q] x[c, p·s+i, q·s+j]   (x padded; = for the first example)
// A thread computes TAPS_PER_THREAD neighbours in j of MAPS_PER_THREAD maps, so that it uses each
// number it reads several times. If there are more threads than such groups of weights,
// `group_size` threads share the rows of each.
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
        __syncthreads();  // the last sums have been read
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

// The backward pass of a convolution (`functional.conv2d_backward`), from its dz to the dz of stage
// P.
//
// The first `input_blocks` blocks (none, if P is the images), with `examples_per_block` examples
// each, compute the gradient with respect to the input, then P's dz and the sums for its batch
// norm:
//   dx[n,c,h,w] = Σ_oij w[o,c,i,j] dy[n, o, (h+pad-i)/s, (w+pad-j)/s]
// over the i and j for which the quotients are integers and in range. That is a convolution with
// stride 1 by the kernel rotated by 180°, of dy with zeros around it and, if the stride is larger,
// between its numbers. The other blocks compute the gradients with respect to the parameters, in
// parts of `examples_per_weight_block` examples, which `sgd` adds up.
//
// Launch: a grid of both kinds of blocks. Moves x, y, dz, w and P's y in; P's dz and the partial
// sums out. Increments *step unless it is null; no other thread reads it in this launch.
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
            const int items = s.channels * seen / p.maps;  // of a channel of P
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
        // TAPS_PER_THREAD more, which are read behind the last one and not used.
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
                __syncthreads();  // `gradients` has been read
            }
        }
    }
    if (step != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
        *step += 1;
    }
}

// -------------------------------------------------------------------------- loss and optimization

// Softmax cross-entropy of one example (`functional.softmax_cross_entropy`), by one thread. Returns
// the loss, NaN if the label is out of range. Replaces the logits z by the gradient of the mean
// loss of n examples, and sets *right to whether the largest logit (the first of equal ones) is the
// label's:
//   dlogits[k] = (p[k] - [k = label]) / n
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

// Returns the label of an example of the batch.
__device__ inline int label_of(const Batch& batch, int e) {
    const int place = *batch.step * batch.stride + e;
    return batch.labels[batch.order == nullptr ? place : batch.order[place]];
}

// Writes the block's parts of the rows losses[*step, :] and correct[*step, :] from the sums of each
// thread. The sum of a row of losses is the mean loss of the n examples, and the sum of a row of
// correct is the number of right predictions.
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

// The last linear layer, the loss, and the backward passes of both, in one launch. The layer has no
// batch norm, no activation and no pooling, and stage P before it is not the images:
//   logits[n,o] = Σ_k x[n,k] w[o,k] + b[o]
//   dx[n,k] = Σ_o dlogits[n,o] w[o,k],   dw[o,k] = Σ_n dlogits[n,o] x[n,k],   db[o] = Σ_n
//   dlogits[n,o]
// Writes the results of the step (`store_results`). If dz_before is not null, also writes the dz of
// stage P, the sums for its batch norm, and the partial sums of dw and db, one part for each block
// that has examples.
//
// Launch: grid (parts of `examples_per_block` examples; parts may be empty). A block computes TILE
// examples at a time. Reads: P's y, w, b, labels. Writes: P's dz, partial sums, losses, correct.
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
    const int pitch = inputs | 1;                // odd: neighbouring rows begin in different banks
    real* x = memory.allocate(TILE * pitch);     // (example, input)
    real* w = memory.allocate(classes * pitch);  // (class, input)
    real* logits = memory.allocate(TILE * classes);  // (example, class); later their gradients
    const int begin = blockIdx.x * examples_per_block, end = min(begin + examples_per_block, n);
    batched_load_store<8, real>(
        classes * inputs, [&](int t) { return weight[t]; },
        [&](int t, real result) { w[t / inputs * pitch + t % inputs] = result; });
    real loss = 0;
    int right = 0;
    for (int first = begin; first < end; first += TILE) {
        const int count = min(TILE, end - first);
        const bool begun = first > begin;  // this block has added partial sums already
        __syncthreads();  // the x and the logits of the examples before have been read
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
                const int area = inputs / p.maps;  // each input of a channel is one of its parts
                const int at = k / area * sums_before.parts + blockIdx.x * area + k % area;
                for (int i = 0; i < 2 && row == 0 && k < inputs; ++i) {
                    real* sum = sums_before.sums + i * p.maps * sums_before.parts + at;
                    *sum = result[i] + (begun ? *sum : real(0));
                }
            }
        }
        const int columns = inputs + (db != nullptr);  // the bias is the weight of an input of 1
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

// Softmax cross-entropy (`functional.softmax_cross_entropy`) of the last stage's output, its
// backward pass, and the results of the step for the host: the sum of losses[*step, :] is the mean
// loss, NaN if a label is out of range; the sum of correct[*step, :] is the number of right
// predictions (the largest logit, the first of equal ones). In training, dz is not null: writes dz
// of the last stage, and the sums for its batch norm, from
//   dlogits[n,k] = (p[n,k] - [k = label]) / n
//
// Launch: grid (parts of `examples_per_block` <= THREADS examples; parts may be empty). A thread
// computes the loss of one example. Moves y and labels in; dz, losses and correct out.
template <typename real, typename P>
__global__ void cross_entropy(P p, int n, int examples_per_block, Batch batch, Norm<real> norm,
                              Sums<real> sums, const real* __restrict__ y, real* __restrict__ dz,
                              real* __restrict__ losses, int* __restrict__ correct) {
    Memory<real> memory;
    const Normalization<real> normalized = normalization(p, n, norm, memory);
    const Input<real, P> input = input_of(p, normalized, y, batch);
    const int classes = p.maps * (p.rows / p.window_h) * (p.columns / p.window_w);
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

// Adds up the partial sums of all gradients, and does a step of `optim.SGD` for all parameters:
//   v ← momentum · v + (g + weight_decay · w),   w ← w - rate · v
// rates[i] is the learning rate of step i; *step has been incremented already. The `tensors` lie
// one after the other and have `size` parameters in all.
//
// Launch: a block updates PARAMETERS_PER_BLOCK neighbouring parameters; THREADS_PER_PARAMETER of
// its threads add up the partial sums of one. Moves parameters, velocities and partial sums in;
// parameters, velocities and gradients out.
template <typename real>
__global__ void sgd(const Tensor* __restrict__ tensors, int size, const real* __restrict__ partials,
                    const int* step, const real* rates, real momentum, real weight_decay,
                    real* __restrict__ parameters, real* __restrict__ gradients,
                    real* __restrict__ velocities) {
    constexpr int THREADS_PER_PARAMETER = THREADS / PARAMETERS_PER_BLOCK;
    real* sums = reinterpret_cast<real*>(shared_memory);
    const int at = blockIdx.x * PARAMETERS_PER_BLOCK + threadIdx.x % PARAMETERS_PER_BLOCK,
              member = threadIdx.x / PARAMETERS_PER_BLOCK;
    const Tensor* own = tensors;
    while (at >= own->offset + own->size && at < size) {
        ++own;
    }
    const Tensor t = *own;
    real sum = 0;
    if (at < size) {
#pragma unroll 16  // so many loads under way at a time; what they load_tile is still added in order
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
