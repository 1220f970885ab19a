// The kernels of a training step and of an evaluation; `launch.py` says in what order.
//
// What they compute is written down in `npbn/functional`, with its derivation; the names of the
// formulas there are used here. `real` is float or double. NVRTC compiles this file for the GPU,
// and g++, behind `tests/engine/cuda_shim.h`, for tests without one.
//
// A stage of the plan is an affine map (convolution or linear), y = A x + b, and what follows it:
// batch norm, activation, pooling, each or none. A launch costs about what the arithmetic of a
// stage does, so a step has few: a kernel ends where batch norm needs sums over the whole batch (a
// stage without it ends there, too), before and after the loss, and before SGD. So the boundaries
// are not where those of the layers are. A forward kernel takes the y of the stage *before* it,
// merges that batch's statistics, normalizes, activates and pools while it reads, and ends with its
// own y. A backward kernel takes the gradient by what batch norm gave, dz, and ends with the dz of
// the stage before:
//
//     y0 → [ norm, activation, pooling · affine map ] → y1 → [ ... ] → y2 → ... → loss
//     dz0 ← [ pooling', activation' · affine map' · norm' ] ← dz1 ← [ ... ] ← dz2 ← ... ← dlogits
//
// In what follows, S is the stage whose affine map a kernel computes, P the one before. For the
// first stage, P is the images: a stage with nothing in it.
//
// Launches. What the plan calls a block is a stage here; a block is CUDA's, THREADS threads in one
// dimension. Convolutions are divided by examples: a block has an example's maps in its shared
// memory, and goes through `share` examples. Linear layers are divided into tiles of SIDE × SIDE
// numbers. No kernel allocates, waits for the host, or depends on a number that the host has to
// read first: a sequence of launches can be captured in a CUDA graph and replayed. What changes
// from step to step is a counter in memory.
//
// Reproducibility. Every sum is taken in an order that the launch fixes: of a thread's own terms
// from first to last, of a block's by threads' numbers, of several blocks' by whoever needs them.
// There are no atomics.
//
// Bytes. "Moves" in the comments below is what has to come from memory, or go there, at least once.
// Numbers between two kernels stay in the second-level cache, if the batch is not very large.

constexpr int THREADS = 256;
constexpr int SIDE = 16;    // of the square that a block's threads form in a matrix product
constexpr int DEPTH = 128;  // how much of the summed axis a product has in shared memory at a time
constexpr int VECTOR = 4;   // numbers that a thread reads from shared memory at once
constexpr int ROWS = 4;     // of a convolution's output, below each other, that a thread computes
constexpr int MAPS = 2;     // in which it does so
constexpr int TAPS = 5;     // of a row of weights whose gradient a thread computes, in MAPS maps
constexpr int BANKS = 32;   // of shared memory, neighbours in neighbouring ones; a power of two
constexpr int WIDTH = 32;   // neighbouring parameters that a block of `sgd` updates together

// For forward kernels: for how many blocks a processor's registers have to do. For few, so that a
// thread may have many, for all that it waits for together; the compiler by itself gives it fewer.
template <typename real>
constexpr int RESIDENT = sizeof(real) == 4 ? 2 : 1;

// The sizes of a stage, known when the program runs.
struct Shape {
    int channels, height, width;                                       // of x: (C, H, W)
    int maps, rows, columns;                                           // of y: (O, H', W')
    int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;  // from x to y
    int window_h, window_w;                                            // pooling, side by side
    int maximum;                                                       // pooling by it, or 0
    int activation;                                                    // see below
};

// The same sizes, known to the compiler: divisions by them become multiplications, and loops over
// them are unrolled. Either may be the S and the P of the kernels.
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

constexpr int SIGMOID = 1, RELU = 2;  // activations; 0 is none

// The batch: its example e is number order[i] of the data set, i = *step · stride + e; number i, if
// order is null.
struct Batch {
    const unsigned char* images;
    const int *labels, *order, *step;
    int stride;
};

// Batch norm of a stage; none, if gamma is null.
// The statistics of a part of the batch, `share` examples but for the last, are what the kernel
// that computed y left: means[o, part] and squares[o, part], the sum of squares about it. Where
// means is null, mean and var are known already: in the backward pass, or the moving averages.
// A mean is two numbers, mean + rest, as one does not say it well enough where it is large: see
// "Rounding" in `functional/batch_norm.py`. In prediction, rest is null.
template <typename real>
struct Norm {
    const real *gamma, *beta;
    const double* means;
    const real* squares;
    real *mean, *rest, *var, *moving_mean, *moving_var;
    int parts, share;
    real eps, momentum;
};

// What batch norm's backward needs besides: for each channel o, and `parts` parts of its numbers,
// sums[0, o, part] = Σ dz (those of dβ) and sums[1, o, part] = Σ dz (y - μ) (those of s·dγ).
template <typename real>
struct Sums {
    real* sums;
    int parts;
    real *dgamma, *dbeta;
};

// A parameter tensor, for `sgd`: where it is in the arrays that hold all parameters; where its
// gradient's partial sums are, and how many (0: the gradient is there already); weight decay or
// not.
struct Tensor {
    int offset, size, partial_offset, partials, decays;
};

// ------------------------------------------------------------------ what the kernels are made of

alignas(32) extern __shared__ double shared_memory[];

// Shared memory: two numbers for each thread, for `group_sums`; then what `take` gives away.
template <typename real>
struct Memory {
    real* free = reinterpret_cast<real*>(shared_memory + 2 * THREADS);

    __device__ real* take(int count) {
        real* taken = free;
        free += (count + VECTOR - 1) / VECTOR * VECTOR;  // the next one's vectors are aligned, too
        return taken;
    }
};

template <typename real, int COUNT>
struct alignas(COUNT * sizeof(real)) Vector {
    real v[COUNT];
};

// store(t, load(t)) for 0 <= t < count, by all threads. A load from far memory takes hundreds of
// cycles, and a store might change what later loads find, for all the compiler knows. So each
// thread loads TOGETHER numbers before it stores any: they are under way at the same time. Where
// there are fewer, it loads the last one again, because a branch would have to wait for what is
// within it.
template <int TOGETHER, typename real, typename Load, typename Store>
__device__ __forceinline__ void transfer(int count, Load load, Store store) {
    for (int start = threadIdx.x; start < count; start += TOGETHER * THREADS) {
        real found[TOGETHER];
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k) {
            found[k] = load(min(start + k * THREADS, count - 1));
        }
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k) {
            if (start + k * THREADS < count) {
                store(start + k * THREADS, found[k]);
            }
        }
    }
}

// The sums of the values that so many neighbouring threads have, in each of them.
template <int COUNT, typename T>
__device__ void group_sums(T (&values)[COUNT], int lanes) {
    T* all = reinterpret_cast<T*>(shared_memory);
    __syncthreads();  // others may still read what was here
    for (int k = 0; k < COUNT; ++k) {
        all[k * THREADS + threadIdx.x] = values[k];
    }
    __syncthreads();
    const T* group = all + threadIdx.x / lanes * lanes;
    for (int k = 0; k < COUNT; ++k) {
        values[k] = 0;
        for (int i = 0; i < lanes; ++i) {
            values[k] += group[k * THREADS + i];
        }
    }
}

template <typename T>
__device__ T group_sum(T value, int lanes) {
    T values[] = {value};
    group_sums(values, lanes);
    return values[0];
}

// How many threads, neighbours, each channel has where a block's threads share out all channels.
__device__ constexpr int lanes_of(int channels) {
    int lanes = 32;
    while (lanes > 1 && lanes * channels > THREADS) {
        lanes /= 2;
    }
    return lanes;
}

template <typename real>
__device__ real activated(int activation, real z) {
    if (activation == SIGMOID) {
        return 1 / (1 + exp(-z));
    }
    return activation == RELU && z <= 0 ? real(0) : z;
}

// The derivative of the activation, by what came out of it.
template <typename real>
__device__ real slope(int activation, real a) {
    if (activation == SIGMOID) {
        return a * (1 - a);
    }
    return activation == RELU && a == 0 ? real(0) : real(1);
}

// Batch norm in shared memory, for each channel: z = (y - mean - rest) · scale + beta.
template <typename real>
struct Normalization {
    real *mean, *rest, *scale, *beta;

    __device__ real centred(int o, real y) const { return y - mean[o] - rest[o]; }
    __device__ real operator()(int o, real y) const { return centred(o, y) * scale[o] + beta[o]; }
};

// The above of a stage P, merged from the parts' statistics where that is still to be done:
//   μ = Σ_t m_t μ_t / m,   m v = Σ_t (q_t + m_t (μ_t - μ)²)
// (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
// variances", 1979, (2.1b) for several parts), in one pass: in double precision, and about the
// first part's mean, the last sum is Σ_t (q_t + m_t (μ_t - μ_0)²) - m (μ - μ_0)². Every block does
// it, which costs less than another launch; the first one leaves μ and v in `mean`, `rest` and
// `var`, and moves the moving averages.
template <typename real, typename P>
__device__ Normalization<real> normalization(P p, int n, const Norm<real>& norm,
                                             Memory<real>& memory) {
    const Normalization<real> found = {memory.take(p.maps), memory.take(p.maps),
                                       memory.take(p.maps), memory.take(p.maps)};
    const int lanes = lanes_of(p.maps), lane = threadIdx.x % lanes, area = p.rows * p.columns;
    for (int first = 0; first < p.maps; first += THREADS / lanes) {
        const int o = first + threadIdx.x / lanes;
        real mean = 0, rest = 0, var = 0;
        if (norm.means != nullptr) {
            const int end = o < p.maps ? norm.parts : 0;
            const double* means = norm.means + o * norm.parts;
            const double pivot = end > 0 ? means[0] : 0;
            double sums[2] = {};  // Σ m_t (μ_t - pivot), and Σ (q_t + m_t (μ_t - pivot)²)
#pragma unroll 8  // so many loads under way at a time; what they bring is still added in order
            for (int t = lane; t < end; t += lanes) {
                const double m = double(area) * min(norm.share, n - t * norm.share);
                const double d = means[t] - pivot;
                sums[0] += m * d;
                sums[1] += norm.squares[o * norm.parts + t] + m * d * d;
            }
            group_sums(sums, lanes);
            const double m = double(area) * n, d = sums[0] / m, mu = pivot + d;
            var = sums[1] / m - d * d;
            mean = mu;
            rest = mu - mean;
            if (blockIdx.x == 0 && blockIdx.y == 0 && lane == 0 && o < p.maps) {
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
        if (lane == 0 && o < p.maps) {
            const bool none = norm.gamma == nullptr;
            found.mean[o] = mean;
            found.rest[o] = rest;
            found.scale[o] = none ? real(1) : norm.gamma[o] / sqrt(var + norm.eps);
            found.beta[o] = none ? real(0) : norm.beta[o];
        }
    }
    __syncthreads();
    return found;
}

// Number `item` of an example's output (C, H, W) after pooling: its channel, and where in y its
// pooling window begins.
template <typename P>
__device__ int window_of(P p, int e, int item, int* channel) {
    const int columns = p.columns / p.window_w, rows = p.rows / p.window_h;
    const int q = item % columns, r = item / columns % rows;
    *channel = item / (columns * rows);
    return ((e * p.maps + *channel) * p.rows + r * p.window_h) * p.columns + q * p.window_w;
}

// The largest activation in a window, the first of equal ones, and where it is. NaN counts as
// larger.
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

// What goes into a stage, number `item` of example e: computed from the y of the stage before it
// or, where y is null, a pixel of the image / 255.
template <typename real, typename P>
struct Input {
    P p;
    Normalization<real> normalized;
    const real* y;
    Batch batch;
    int first;  // where the batch begins in `order`

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

// Takes g, the gradient by a number that `Input` computes, back through pooling and activation to
// dz, the gradient by what batch norm gave, and adds to the sums that batch norm's backward needs.
// Activations are computed anew from y.
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
            const real d = reached ? g * slope(p.activation, a) : real(0);
            sums[0] += d;
            sums[1] += d * normalized.centred(o, y[at]);
            dz[at] = d;
        }
    }
}

// The gradient by y, through batch norm, `functional.batch_norm_backward` (m values a channel):
//   dy = γ/s (dz - dβ/m - (y - μ) dγ/(s m)),   dβ = Σ dz,   dγ = Σ dz (y - μ) / s
// Without batch norm, dz itself.
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

// The above of a stage S, to be used after a barrier. The first block leaves dβ and dγ behind.
template <typename real, typename S>
__device__ Gradient<real> gradient_of(S s, int n, const Norm<real>& norm, const Sums<real>& sums,
                                      const real* y, const real* dz, Memory<real>& memory) {
    const Normalization<real> normalized = normalization(s, n, norm, memory);
    const Gradient<real> found = {
        y, dz, normalized, memory.take(s.maps), memory.take(s.maps), norm.gamma != nullptr};
    const int lanes = lanes_of(s.maps), lane = threadIdx.x % lanes;
    const real m = real(n) * s.rows * s.columns;
    for (int first = 0; found.norm && first < s.maps; first += THREADS / lanes) {
        const int o = first + threadIdx.x / lanes;
        const int end = o < s.maps ? sums.parts : 0;
        real found_sums[2] = {};
        for (int t = lane; t < end; t += lanes) {
            found_sums[0] += sums.sums[o * sums.parts + t];
            found_sums[1] += sums.sums[(s.maps + o) * sums.parts + t];
        }
        group_sums(found_sums, lanes);
        if (lane == 0 && o < s.maps) {
            const real root = sqrt(norm.var[o] + norm.eps);
            found.shift[o] = found_sums[0] / m;
            found.factor[o] = found_sums[1] / (root * root * m);
            if (blockIdx.x == 0) {
                sums.dbeta[o] = found_sums[0];
                sums.dgamma[o] = found_sums[1] / root;
            }
        }
    }
    return found;
}

// Adds `count` numbers of a channel to the `had` that its part of the statistics has already
// (Chan et al., (2.1)). `mean` is theirs but for rounding; `sums` are those of their distances to
// it, and of the squares, so that what was lost in rounding is found again.
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

// A block's tile of a product: Σ_k left(row, k) right(column, k), begin <= k < end, for SIDE rows
// and columns. Thread t has row t % SIDE and column t / SIDE. Strips of the two matrices, DEPTH in
// k, are brought to shared memory together, where SIDE threads read each number; what is outside of
// the matrices is 0 there. Whether neighbours in k, rather than neighbours in row or column, are
// neighbours in memory is for the caller to say; neighbouring threads then read them so. Once for
// each number on the left, keep(row, k, number).
template <typename real, typename Left, typename Right, typename Keep>
__device__ real tile_of_product(int rows, int columns, int begin, int end, Left left,
                                bool left_along_k, Right right, bool right_along_k, real* strips,
                                Keep keep) {
    using Four = Vector<real, VECTOR>;
    constexpr int PITCH = DEPTH + VECTOR;  // rows one above the other begin in different banks
    real *lefts = strips, *rights = strips + SIDE * PITCH;
    real sums[VECTOR] = {};
    for (int start = begin; start < end; start += DEPTH) {
        const int depth = min(DEPTH, end - start);
        // What is outside of a matrix is a number at its edge, until it is stored.
        const auto bring = [&](int count, auto matrix, bool along_k, real* strip, auto kept) {
            transfer<SIDE * DEPTH / THREADS, real>(
                SIDE * DEPTH,
                [&](int t) {
                    const int k = along_k ? t % DEPTH : t / SIDE;
                    const int i = along_k ? t / DEPTH : t % SIDE;
                    return matrix(min(i, count - 1), start + min(k, depth - 1));
                },
                [&](int t, real found) {
                    const int k = along_k ? t % DEPTH : t / SIDE;
                    const int i = along_k ? t / DEPTH : t % SIDE;
                    const bool inside = i < count && k < depth;
                    strip[i * PITCH + k] = inside ? found : real(0);
                    if (inside) {
                        kept(i, start + k, found);
                    }
                });
        };
        __syncthreads();  // before this strip takes the place of the last one
        bring(rows, left, left_along_k, lefts, keep);
        bring(columns, right, right_along_k, rights, [](int, int, real) {});
        __syncthreads();
        const Four* a = reinterpret_cast<const Four*>(lefts + threadIdx.x % SIDE * PITCH);
        const Four* b = reinterpret_cast<const Four*>(rights + threadIdx.x / SIDE * PITCH);
        for (int k = 0; k < (depth + VECTOR - 1) / VECTOR; ++k) {
            const Four x = a[k], w = b[k];
            for (int i = 0; i < VECTOR; ++i) {
                sums[i] += x.v[i] * w.v[i];
            }
        }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// A linear layer of the stage before's output, `functional.linear`: y[n,o] = Σ_k x[n,k] w[o,k] + b.
// With it, unless null, x, for the backward pass; and the statistics of this part of the batch.
//
// Launch: grid (parts of `share` examples, tiles of SIDE outputs). Moves the stage before's y and w
// in, y and x out.
template <typename real, typename P, typename S>
__global__ void __launch_bounds__(THREADS, RESIDENT<real>)
    linear_forward(P p, S s, int n, int share, Batch batch, Norm<real> norm,
                   const real* __restrict__ before, const real* __restrict__ weight,
                   const real* __restrict__ bias, real* __restrict__ x, real* __restrict__ y,
                   double* __restrict__ means, real* __restrict__ squares) {
    Memory<real> memory;
    const Input<real, P> input = input_of(p, normalization(p, n, norm, memory), before, batch);
    const int inputs = s.channels, begin = blockIdx.x * share, end = min(begin + share, n);
    const int first_map = blockIdx.y * SIDE, o = first_map + threadIdx.x / SIDE;
    for (int e = begin; e < end; e += SIDE) {
        const int count = min(SIDE, end - e), row = threadIdx.x % SIDE;
        real value = tile_of_product<real>(
            count, s.maps - first_map, 0, inputs, [&](int i, int k) { return input(e + i, k); },
            true, [&](int i, int k) { return weight[(first_map + i) * inputs + k]; }, true,
            memory.free,
            [&](int i, int k, real found) {
                if (x != nullptr && first_map == 0) {
                    x[(e + i) * inputs + k] = found;
                }
            });
        value += bias == nullptr || o >= s.maps ? real(0) : bias[o];
        if (row < count && o < s.maps) {
            y[(e + row) * s.maps + o] = value;
        }
        if (means != nullptr) {
            const real mean = group_sum(row < count ? value : real(0), SIDE) / count;
            const real d = row < count ? value - mean : real(0);
            real sums[] = {d, d * d};
            group_sums(sums, SIDE);
            if (row == 0 && o < s.maps) {
                const int part = o * gridDim.x + blockIdx.x;
                merge(e - begin, count, mean, sums, means + part, squares + part);
            }
        }
    }
}

// The backward of a linear layer, `functional.linear_backward`, between two batch norms' dz.
//
// The first `input_blocks` blocks go on to the stage before (none: it is the images):
//   dx[n,k] = Σ_o dy[n,o] w[o,k], and from there dz before, and its sums.
// The others compute the gradients by the parameters, in parts of `weight_share` examples, which
// `sgd` adds up; the bias's as if it were the weight of an input that is always 1:
//   dw[o,k] = Σ_n dy[n,o] x[n,k]
//
// Launch: a grid of input_blocks, tiles of SIDE inputs by parts of `share` examples, and of tiles
// of (outputs, inputs) by parts of the weight's. Moves x, y, dz, w and the stage before's y in; its
// dz and the partial sums out. Counts the step, where `step` is given: nobody else reads it
// meanwhile.
template <typename real, typename P, typename S>
__global__ void linear_backward(P p, S s, int n, int input_blocks, int share, int weight_share,
                                Norm<real> norm, Sums<real> sums, Norm<real> norm_before,
                                Sums<real> sums_before, const real* __restrict__ before,
                                const real* __restrict__ weight, const real* __restrict__ x,
                                const real* __restrict__ y, const real* __restrict__ dz,
                                real* __restrict__ dz_before, real* __restrict__ dw,
                                real* __restrict__ db, int* step) {
    Memory<real> memory;
    const Gradient<real> dy = gradient_of(s, n, norm, sums, y, dz, memory);
    const int inputs = s.channels, tiles = (inputs + SIDE - 1) / SIDE;
    const int row = threadIdx.x % SIDE, column = threadIdx.x / SIDE;
    if (blockIdx.x < input_blocks) {
        const Normalization<real> normalized = normalization(p, n, norm_before, memory);
        const int part = blockIdx.x / tiles, first = blockIdx.x % tiles * SIDE;
        const int begin = part * share, end = min(begin + share, n), k = first + column;
        real found[2] = {};
        for (int e = begin; e < end; e += SIDE) {
            const real g = tile_of_product<real>(
                end - e, inputs - first, 0, s.maps,
                [&](int i, int o) { return dy(o, (e + i) * s.maps + o); }, true,
                [&](int i, int o) { return weight[o * inputs + first + i]; }, false, memory.free,
                [](int, int, real) {});
            if (e + row < end && k < inputs) {
                input_backward(p, normalized, before, e + row, k, g, dz_before, found);
            }
        }
        if (norm_before.gamma != nullptr) {
            group_sums(found, SIDE);
            if (row == 0 && k < inputs) {
                const int area = inputs / p.maps;  // every input has parts of its own
                const int at = k / area * sums_before.parts + part * area + k % area;
                sums_before.sums[at] = found[0];
                sums_before.sums[p.maps * sums_before.parts + at] = found[1];
            }
        }
    } else {
        const int columns = inputs + (db != nullptr);
        const int across = (columns + SIDE - 1) / SIDE, down = (s.maps + SIDE - 1) / SIDE;
        const int tile = blockIdx.x - input_blocks, part = tile / (across * down);
        const int first_map = tile / across % down * SIDE, first = tile % across * SIDE;
        const int begin = part * weight_share, end = min(begin + weight_share, n);
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

// An example's planes in shared memory, with some room behind rows and planes: what neighbouring
// threads read at a time is then in different banks, as far as it can be.
struct Planes {
    int height, width, pitch, area;
};

// The number, or the next above it that leaves what `like` leaves when divided by `divisor`.
__device__ constexpr int raised(int number, int like, int divisor) {
    return number + ((like - number) & (divisor - 1));
}

// What a convolution to maps of rows × columns reads, by threads with ROWS rows each: where a row's
// threads end in the banks, those ROWS below it begin.
__device__ constexpr Planes planes_read(int rows, int columns, int kernel_h, int kernel_w,
                                        int stride_h, int stride_w) {
    const int height = ((rows + ROWS - 1) / ROWS * ROWS - 1) * stride_h + kernel_h;
    const int width = (columns - 1) * stride_w + kernel_w;
    const int pitch = raised(width, (columns + ROWS - 1) / ROWS, BANKS / ROWS);
    return {height, width, pitch, height * pitch};
}

// What the gradient by its weights reads, by threads for each row of the kernel, and each channel:
// where a channel's rows end in the banks, those of the next begin.
__device__ constexpr Planes planes_summed(int rows, int columns, int kernel_h, int kernel_w,
                                          int stride_h, int stride_w) {
    const int height = (rows - 1) * stride_h + kernel_h;
    const int width = (columns - 1) * stride_w + kernel_w, pitch = width | 1;
    return {height, width, pitch, raised(height * pitch, kernel_h * pitch, BANKS)};
}

__device__ constexpr Planes planes_of_maps(int rows, int columns) {
    return {rows, columns, columns | 1, rows * (columns | 1)};
}

// Zeros everywhere. What is not written to afterwards, the padding, keeps them.
template <typename real>
__device__ void clear(real* planes, int count) {
    for (int t = threadIdx.x; t < count; t += THREADS) {
        planes[t] = 0;
    }
    __syncthreads();
}

// An example's maps into planes: number t, load(t), at (i, j) of its map comes to
// (i · stride_h + above, j · stride_w + left). What lies outside of the planes, nobody reads.
// Then keep(t, load(t)).
template <int TOGETHER, typename real, typename Load, typename Keep>
__device__ __forceinline__ void spread(int maps, int rows, int columns, Planes layout, int stride_h,
                                       int stride_w, int above, int left, real* planes, Load load,
                                       Keep keep) {
    transfer<TOGETHER, real>(maps * rows * columns, load, [&](int t, real found) {
        const int map = t / (rows * columns);
        const int i = t / columns % rows * stride_h + above, j = t % columns * stride_w + left;
        if (0 <= i && i < layout.height && 0 <= j && j < layout.width) {
            planes[map * layout.area + i * layout.pitch + j] = found;
        }
        keep(t, found);
    });
}

// The sum that convolution and its backward by the input are:
//   out[o,p,q] = bias(o) + Σ_cij w(o,c,i,j) in[c, p·stride_h + i, q·stride_w + j]
// `in` and `out` are in shared memory, and so is a strip of the weights at a time, those of
// `strip` channels, with a map's neighbours beside it. A thread computes ROWS outputs, one below
// the other, in MAPS maps: each number it reads is then used several times.
template <typename real, typename Bias, typename Weight>
__device__ __forceinline__ void correlate(int channels, const real* in, int maps, int rows,
                                          int columns, int kernel_h, int kernel_w, int stride_h,
                                          int stride_w, Bias bias, Weight weight, int strip,
                                          real* weights, real* out) {
    using Pair = Vector<real, MAPS>;
    const Planes layout = planes_read(rows, columns, kernel_h, kernel_w, stride_h, stride_w);
    const int pitch = layout.pitch, plane = layout.area;
    const int groups = (maps + MAPS - 1) / MAPS, strips = (rows + ROWS - 1) / ROWS;
    const int taps = kernel_h * kernel_w;
    for (int first = 0; first < channels; first += strip) {
        const int count = min(strip, channels - first);
        __syncthreads();  // before these weights take the place of the last ones
        transfer<8, real>(
            count * taps * groups * MAPS,
            [&](int t) {
                const int o = t % (groups * MAPS), tap = t / (groups * MAPS) % taps;
                const int c = first + t / (groups * MAPS * taps);
                // Down the kernel's columns: that is the order in which they are used.
                return o < maps ? weight(o, c, tap % kernel_h, tap / kernel_h) : real(0);
            },
            [&](int t, real found) { weights[t] = found; });
        __syncthreads();
        for (int t = threadIdx.x; t < groups * strips * columns; t += THREADS) {
            const int q = t % columns, p = t / columns % strips * ROWS;
            const int group = t / (columns * strips);
            real sums[MAPS][ROWS];
            for (int m = 0; m < MAPS; ++m) {
                const int o = group * MAPS + m;
                for (int r = 0; r < ROWS; ++r) {
                    const bool begun = first > 0 && o < maps && p + r < rows;
                    sums[m][r] = begun ? out[(o * rows + p + r) * columns + q] : real(0);
                }
            }
            const real* corner = in + first * plane + p * stride_h * pitch + q * stride_w;
            const Pair* taken = reinterpret_cast<const Pair*>(weights) + group;
            for (int c = 0; c < count; ++c) {
                for (int j = 0; j < kernel_w; ++j) {
#pragma unroll
                    for (int i = 0; i < kernel_h; ++i) {
                        const Pair w = taken[((c * kernel_w + j) * kernel_h + i) * groups];
                        for (int r = 0; r < ROWS; ++r) {
                            const real v = corner[c * plane + (r * stride_h + i) * pitch + j];
                            for (int m = 0; m < MAPS; ++m) {
                                sums[m][r] += w.v[m] * v;
                            }
                        }
                    }
                }
            }
            for (int m = 0; m < MAPS; ++m) {
                const int o = group * MAPS + m;
                const real last = first + count == channels && o < maps ? bias(o) : real(0);
                for (int r = 0; r < ROWS; ++r) {
                    if (o < maps && p + r < rows) {
                        out[(o * rows + p + r) * columns + q] = sums[m][r] + last;
                    }
                }
            }
        }
    }
    __syncthreads();
}

// A convolution of the stage before's output, `functional.conv2d`:
//   y[n,o,p,q] = b[o] + Σ_cij w[o,c,i,j] x[n, c, p·s+i-pad, q·s+j-pad]
// With it, unless null, x, for the backward pass; and the statistics of this part of the batch.
//
// Launch: grid (parts of `share` examples). Moves the stage before's y (at first: the images) and w
// in, y and x out.
template <typename real, typename P, typename S>
__global__ void __launch_bounds__(THREADS, RESIDENT<real>)
    conv_forward(P p, S s, int n, int share, int strip, Batch batch, Norm<real> norm,
                 const real* __restrict__ before, const real* __restrict__ weight,
                 const real* __restrict__ bias, real* __restrict__ x, real* __restrict__ y,
                 double* __restrict__ means, real* __restrict__ squares) {
    Memory<real> memory;
    const Input<real, P> input = input_of(p, normalization(p, n, norm, memory), before, batch);
    const int pixels = s.channels * s.height * s.width, area = s.rows * s.columns;
    const Planes layout =
        planes_read(s.rows, s.columns, s.kernel_h, s.kernel_w, s.stride_h, s.stride_w);
    real* planes = memory.take(s.channels * layout.area);
    real* out = memory.take(s.maps * area);
    clear(planes, s.channels * layout.area);
    const int begin = blockIdx.x * share, end = min(begin + share, n);
    for (int e = begin; e < end; ++e) {
        spread<4>(  // no more: each takes long to compute
            s.channels, s.height, s.width, layout, 1, 1, s.padding_h, s.padding_w, planes,
            [&](int t) { return input(e, t); },
            [&](int t, real found) {
                if (x != nullptr) {
                    x[e * pixels + t] = found;
                }
            });
        correlate<real>(
            s.channels, planes, s.maps, s.rows, s.columns, s.kernel_h, s.kernel_w, s.stride_h,
            s.stride_w, [&](int o) { return bias == nullptr ? real(0) : bias[o]; },
            [&](int o, int c, int i, int j) {
                return weight[((o * s.channels + c) * s.kernel_h + i) * s.kernel_w + j];
            },
            strip, memory.free, out);
        for (int t = threadIdx.x; t < s.maps * area; t += THREADS) {
            y[e * s.maps * area + t] = out[t];
        }
        if (means == nullptr) {
            continue;
        }
        const int lanes = lanes_of(s.maps), lane = threadIdx.x % lanes;
        for (int first = 0; first < s.maps; first += THREADS / lanes) {
            const int o = first + threadIdx.x / lanes, last = o < s.maps ? area : 0;
            const real* map = out + o * area;
            real sum = 0, sums[2] = {};
            for (int t = lane; t < last; t += lanes) {
                sum += map[t];
            }
            const real mean = group_sum(sum, lanes) / area;
            for (int t = lane; t < last; t += lanes) {
                const real d = map[t] - mean;
                sums[0] += d;
                sums[1] += d * d;
            }
            group_sums(sums, lanes);
            if (lane == 0 && o < s.maps) {
                const int part = o * gridDim.x + blockIdx.x;
                merge((e - begin) * area, area, mean, sums, means + part, squares + part);
            }
        }
    }
}

// An example's gradient by the weights, `functional.conv2d_backward`:
//   dw[o,c,i,j] += Σ_pq dy[o,p,q] x[c, p·s+i, q·s+j]   (x padded; = for the first example)
// A thread has TAPS neighbours in j, of MAPS maps: each number it reads is used several times.
// Where there are more threads than such groups, each group's rows are shared out among `lanes`.
template <typename real, typename S>
__device__ __forceinline__ void add_weight_gradient(S s, bool first, Planes layout,
                                                    const real* planes, Planes map_layout,
                                                    const real* dy, real* sums, real* dw) {
    const int across = (s.kernel_w + TAPS - 1) / TAPS, pairs = (s.maps + MAPS - 1) / MAPS;
    const int groups = pairs * s.channels * s.kernel_h * across;
    const int most = max(1, min(s.rows, THREADS / groups)), each = (s.rows + most - 1) / most;
    const int lanes = (s.rows + each - 1) / each, lane = threadIdx.x % lanes;
    const int together = THREADS / lanes;
    for (int start = 0; start < groups; start += together) {
        const int own = threadIdx.x / lanes, group = start + own;
        real found[MAPS][TAPS] = {};
        if (own < together && group < groups) {
            const int j = group % across * TAPS, i = group / across % s.kernel_h;
            const int c = group / (across * s.kernel_h) % s.channels;
            const int o = group / (across * s.kernel_h * s.channels) * MAPS;
            for (int p = lane; p < s.rows; p += lanes) {
                const real* seen =
                    planes + c * layout.area + (p * s.stride_h + i) * layout.pitch + j;
                const real* above = dy + o * map_layout.area + p * map_layout.pitch;
#pragma unroll 8
                for (int q = 0; q < s.columns; ++q) {
                    for (int m = 0; m < MAPS; ++m) {
                        const real d = above[m * map_layout.area + q];
                        for (int t = 0; t < TAPS; ++t) {
                            found[m][t] += d * seen[q * s.stride_w + t];
                        }
                    }
                }
            }
        }
        __syncthreads();  // the sums before have been read
        for (int m = 0; m < MAPS; ++m) {
            for (int t = 0; t < TAPS; ++t) {
                sums[(m * TAPS + t) * THREADS + threadIdx.x] = found[m][t];
            }
        }
        __syncthreads();
        for (int t = threadIdx.x; t < together * MAPS * TAPS; t += THREADS) {
            const int m = t / TAPS % MAPS, member = start + t / (MAPS * TAPS);
            const int j = member % across * TAPS + t % TAPS, i = member / across % s.kernel_h;
            const int c = member / (across * s.kernel_h) % s.channels;
            const int o = member / (across * s.kernel_h * s.channels) * MAPS + m;
            if (member < groups && j < s.kernel_w && o < s.maps) {
                real* place = dw + ((o * s.channels + c) * s.kernel_h + i) * s.kernel_w + j;
                const real* parts = sums + t % (MAPS * TAPS) * THREADS + t / (MAPS * TAPS) * lanes;
                real sum = first ? real(0) : *place;
                for (int l = 0; l < lanes; ++l) {
                    sum += parts[l];
                }
                *place = sum;
            }
        }
    }
}

// The backward of a convolution, `functional.conv2d_backward`, between two batch norms' dz.
//
// The first `input_blocks` blocks, with `share` examples each, go on to the stage before (none: it
// is the images):
//   dx[n,c,h,w] = Σ_oij w[o,c,i,j] dy[n, o, (h+pad-i)/s, (w+pad-j)/s]
// over the i and j for which the divisions leave nothing and the results are rows and columns of y.
// That is a convolution of stride 1 by the kernel turned by 180°, of dy with zeros around and, for
// a larger stride, between its numbers. From dx on to dz before, and its sums. The others compute
// the gradients by the parameters, in parts of `weight_share` examples, which `sgd` adds up.
//
// Launch: a grid of both kinds of blocks. Moves x, y, dz, w and the stage before's y in; its dz and
// the partial sums out. Counts the step, where `step` is given: nobody else reads it meanwhile.
template <typename real, typename P, typename S>
__global__ void conv_backward(P p, S s, int n, int input_blocks, int share, int weight_share,
                              int strip, Norm<real> norm, Sums<real> sums, Norm<real> norm_before,
                              Sums<real> sums_before, const real* __restrict__ before,
                              const real* __restrict__ weight, const real* __restrict__ x,
                              const real* __restrict__ y, const real* __restrict__ dz,
                              real* __restrict__ dz_before, real* __restrict__ dw,
                              real* __restrict__ db, int* step) {
    Memory<real> memory;
    const Gradient<real> dy = gradient_of(s, n, norm, sums, y, dz, memory);
    const int area = s.rows * s.columns, seen = s.height * s.width;
    if (blockIdx.x < input_blocks) {
        const Normalization<real> normalized = normalization(p, n, norm_before, memory);
        const Planes layout = planes_read(s.height, s.width, s.kernel_h, s.kernel_w, 1, 1);
        real* planes = memory.take(s.maps * layout.area);
        real* dx = memory.take(s.channels * seen);
        clear(planes, s.maps * layout.area);
        const int begin = blockIdx.x * share, end = min(begin + share, n);
        for (int e = begin; e < end; ++e) {
            spread<8>(
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
                strip, memory.free, dx);
            const int lanes = lanes_of(p.maps), lane = threadIdx.x % lanes;
            const int items = s.channels * seen / p.maps;  // of a channel of the stage before
            for (int first = 0; first < p.maps; first += THREADS / lanes) {
                const int o = first + threadIdx.x / lanes, last = o < p.maps ? items : 0;
                real found[2] = {};
#pragma unroll 4
                for (int t = lane; t < last; t += lanes) {
                    input_backward(p, normalized, before, e, o * items + t, dx[o * items + t],
                                   dz_before, found);
                }
                if (norm_before.gamma != nullptr) {
                    group_sums(found, lanes);
                    for (int k = 0; k < 2 && lane == 0 && o < p.maps; ++k) {
                        real* sum =
                            sums_before.sums + (k * p.maps + o) * sums_before.parts + blockIdx.x;
                        *sum = found[k] + (e == begin ? real(0) : *sum);
                    }
                }
            }
        }
    } else {
        const int part = blockIdx.x - input_blocks, pixels = s.channels * seen;
        const Planes map_layout = planes_of_maps(s.rows, s.columns);
        const Planes layout =
            planes_summed(s.rows, s.columns, s.kernel_h, s.kernel_w, s.stride_h, s.stride_w);
        // TAPS more: what is read, and not used, behind the last.
        real* planes = memory.take(s.channels * layout.area + TAPS);
        real* gradients = memory.take((s.maps + MAPS - 1) / MAPS * MAPS * map_layout.area);
        real* results = memory.take(MAPS * TAPS * THREADS);
        clear(planes, s.channels * layout.area);
        dw += part * s.maps * s.channels * s.kernel_h * s.kernel_w;
        const int begin = part * weight_share, end = min(begin + weight_share, n);
        for (int e = begin; e < end; ++e) {
            spread<8>(
                s.channels, s.height, s.width, layout, 1, 1, s.padding_h, s.padding_w, planes,
                [&](int t) { return x[e * pixels + t]; }, [](int, real) {});
            spread<8>(
                s.maps, s.rows, s.columns, map_layout, 1, 1, 0, 0, gradients,
                [&](int t) { return dy(t / area, e * s.maps * area + t); }, [](int, real) {});
            __syncthreads();
            add_weight_gradient(s, e == begin, layout, planes, map_layout, gradients, results, dw);
            const int lanes = lanes_of(s.maps), lane = threadIdx.x % lanes;
            for (int first = 0; db != nullptr && first < s.maps; first += THREADS / lanes) {
                const int o = first + threadIdx.x / lanes, last = o < s.maps ? area : 0;
                real sum = 0;
                for (int t = lane; t < last; t += lanes) {
                    const int place = t / s.columns * map_layout.pitch + t % s.columns;
                    sum += gradients[o * map_layout.area + place];
                }
                sum = group_sum(sum, lanes);
                if (lane == 0 && o < s.maps) {
                    real* all = db + part * s.maps + o;
                    *all = sum + (e == begin ? real(0) : *all);
                }
            }
        }
    }
    if (step != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
        *step += 1;
    }
}

// -------------------------------------------------------------------------- loss and optimization

// Softmax cross-entropy, `functional.softmax_cross_entropy` and its backward, of the last stage's
// output, and what the host wants to know of the step: the sum of losses[*step, :] is the mean
// loss, NaN if a label is out of range; that of hits[*step, :], how often the largest logit (the
// first of equal ones) was the label's. In training, dz is not null:
//   dlogits[n,k] = (p[n,k] - [k = label]) / n, and from there dz of the last stage, and its sums.
//
// Launch: grid (parts of `share` <= THREADS examples; some parts may be empty). A thread has one
// example's loss. Moves y and labels in, dz, losses and hits out.
template <typename real, typename P>
__global__ void cross_entropy(P p, int n, int share, Batch batch, Norm<real> norm, Sums<real> sums,
                              const real* __restrict__ y, real* __restrict__ dz,
                              real* __restrict__ losses, int* __restrict__ hits) {
    Memory<real> memory;
    const Normalization<real> normalized = normalization(p, n, norm, memory);
    const Input<real, P> input = input_of(p, normalized, y, batch);
    const int classes = p.maps * (p.rows / p.window_h) * (p.columns / p.window_w);
    real* logits = memory.take(share * classes);
    const int begin = blockIdx.x * share, count = max(0, min(share, n - begin));
    for (int t = threadIdx.x; t < count * classes; t += THREADS) {
        logits[t] = input(begin + t / classes, t % classes);
    }
    __syncthreads();
    real loss = 0;
    int right = 0;
    if (threadIdx.x < count) {
        real* z = logits + threadIdx.x * classes;
        const int place = *batch.step * batch.stride + begin + threadIdx.x;
        const int label = batch.labels[batch.order == nullptr ? place : batch.order[place]];
        int largest = 0;
        for (int k = 1; k < classes; ++k) {
            if (z[k] > z[largest]) {
                largest = k;
            }
        }
        const real top = z[largest];
        const bool known = 0 <= label && label < classes;
        loss = known ? top - z[label] : real(nan(""));
        right = largest == label;
        real sum = 0;
        for (int k = 0; k < classes; ++k) {
            z[k] = exp(z[k] - top);
            sum += z[k];
        }
        loss += log(sum);
        for (int k = 0; k < classes; ++k) {
            z[k] = (z[k] / sum - (k == label ? 1 : 0)) / n;
        }
    }
    loss = group_sum(loss, SIDE);
    right = group_sum(right, SIDE);
    if (threadIdx.x % SIDE == 0) {
        const int block = *batch.step * gridDim.x + blockIdx.x;
        const int at = block * (THREADS / SIDE) + threadIdx.x / SIDE;
        losses[at] = loss / n;
        hits[at] = right;
    }
    if (dz == nullptr) {
        return;
    }
    const int lanes = lanes_of(p.maps), lane = threadIdx.x % lanes, items = classes / p.maps;
    for (int first = 0; first < p.maps; first += THREADS / lanes) {
        const int o = first + threadIdx.x / lanes, last = o < p.maps ? count * items : 0;
        real found[2] = {};
        for (int t = lane; t < last; t += lanes) {
            const int e = t / items, k = o * items + t % items;
            input_backward(p, normalized, y, begin + e, k, logits[e * classes + k], dz, found);
        }
        if (norm.gamma != nullptr) {
            group_sums(found, lanes);
            if (lane == 0 && o < p.maps) {
                sums.sums[o * sums.parts + blockIdx.x] = found[0];
                sums.sums[(p.maps + o) * sums.parts + blockIdx.x] = found[1];
            }
        }
    }
}

// The gradients' partial sums added up, and a step of `optim.SGD` for all parameters:
//   v ← momentum · v + (g + weight_decay · w),   w ← w - rate · v
// rates[i] is the learning rate of step i; the step has been counted already. `tensors` lie one
// after the other, `size` parameters together.
// Launch: a block has WIDTH neighbouring parameters; of its threads, LANES share the partial sums
// of one. Moves parameters, velocities and partial sums in; parameters, velocities, gradients out.
template <typename real>
__global__ void sgd(const Tensor* __restrict__ tensors, int size, const real* __restrict__ partials,
                    const int* step, const real* rates, real momentum, real weight_decay,
                    real* __restrict__ parameters, real* __restrict__ gradients,
                    real* __restrict__ velocities) {
    constexpr int LANES = THREADS / WIDTH;
    real* sums = reinterpret_cast<real*>(shared_memory);
    const int at = blockIdx.x * WIDTH + threadIdx.x % WIDTH, lane = threadIdx.x / WIDTH;
    const Tensor* own = tensors;
    while (at >= own->offset + own->size && at < size) {
        ++own;
    }
    const Tensor t = *own;
    real sum = 0;
    if (at < size) {
#pragma unroll 16  // so many loads under way at a time; what they bring is still added in order
        for (int b = lane; b < t.partials; b += LANES) {
            sum += partials[t.partial_offset + b * t.size + at - t.offset];
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (lane == 0 && at < size) {
        for (int l = 1; l < LANES; ++l) {
            sum += sums[l * WIDTH + threadIdx.x];
        }
        const real g = t.partials == 0 ? gradients[at] : sum;
        gradients[at] = g;
        real v = t.decays ? g + weight_decay * parameters[at] : g;
        v += momentum * velocities[at];
        velocities[at] = v;
        parameters[at] -= rates[*step - 1] * v;
    }
}
