// The kernels of a training step and of an evaluation; `npbn/engine/launch.py` says in what order.
//
// What they compute is written down in `npbn/functional`, with its derivation; the names of the
// formulas there are used here. `real` is float or double. NVRTC compiles this file for the GPU,
// and g++, behind `tests/engine/cuda_shim.h`, for tests without one.
//
// Arrays. Images and feature maps lie in memory as (N, C, H, W), matrices as (N, D). A linear layer
// is a convolution of images of one pixel, D channels, by a kernel of 1 × 1; there is no other code
// for it. No pooling is the average of windows of 1 × 1.
//
// Launches. A block is CUDA's here; those of the plan are called stages. Every block has THREADS
// threads in one dimension. No kernel allocates, waits for the host, or depends on a number that
// the host has to read first: a sequence of launches can be captured in a CUDA graph and replayed.
// What changes from step to step is a counter in memory.
//
// Reproducibility. Every sum is taken in an order that the launch fixes: of a thread's own terms
// from first to last, of a block's by a tree, of several blocks' partial sums by the kernel that
// needs them. There are no atomics.
//
// Bytes. "Moves" in the comments below is what has to come from memory, or go there, at least once,
// in numbers of type real; what is read again meanwhile is left in the caches.

constexpr int THREADS = 256;
constexpr int SIDE = 16;   // of the square that a block's threads form in a matrix product
constexpr int DEPTH = 32;  // how much of the summed axis a product has in shared memory at a time

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
// them are unrolled. Either may be the S of the kernels.
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

// A parameter tensor, for `sgd`: where it is in the arrays that hold all parameters; where its
// gradient's partial sums are, and how many (0: the gradient is there already); weight decay or
// not.
struct Tensor {
    int offset, size, partial_offset, partials, decays;
};

// ------------------------------------------------------------------ what the kernels are made of

extern __shared__ double shared_memory[];

template <typename real>
__device__ real* shared() {
    return reinterpret_cast<real*>(shared_memory);
}

// The sum of the values that a block's threads have, in each of them.
template <typename T>
__device__ T block_sum(T value) {
    T* sums = shared<T>();
    sums[threadIdx.x] = value;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
        }
    }
    __syncthreads();
    const T sum = sums[0];
    __syncthreads();  // nobody may use the memory again before all have read
    return sum;
}

// The same over the SIDE threads that have one column of a product.
template <typename real>
__device__ real column_sum(real value) {
    real* values = shared<real>();
    values[threadIdx.x] = value;
    __syncthreads();
    const real* column = values + threadIdx.x / SIDE * SIDE;
    real sum = 0;
    for (int i = 0; i < SIDE; ++i) {
        sum += column[i];
    }
    __syncthreads();
    return sum;
}

// What a matrix product is made of: left(row, k) and right(k, column), for row < rows, column <
// columns and begin <= k < end. How they lie in memory, too: whether neighbours in k are neighbours
// there, rather than neighbours in row or column; neighbouring threads then read them so.
template <typename Left, typename Right>
struct Product {
    int rows, columns, begin, end;
    Left left;
    bool left_along_k;
    Right right;
    bool right_along_k;
};

template <typename Left, typename Right>
__device__ Product<Left, Right> product_of(int rows, int columns, int begin, int end, Left left,
                                           bool left_along_k, Right right, bool right_along_k) {
    return {rows, columns, begin, end, left, left_along_k, right, right_along_k};
}

// A block's tile of a product: Σ_k left(row, k) right(k, column).
//
// The tile has M·SIDE rows from `first_row` on and SIDE columns from `first_column` on. Thread t
// has the rows t % SIDE, SIDE further, and so on, M of them, of column t / SIDE. Strips of the two
// matrices, DEPTH in k, are brought to shared memory together, where SIDE threads read each number;
// what is outside of the matrices is 0 there.
template <typename real, int M, typename Left, typename Right>
__device__ void tile_of_product(const Product<Left, Right>& p, int first_row, int first_column,
                                real (&sums)[M]) {
    constexpr int ROWS = M * SIDE;
    // One more than needed: then numbers one above the other are in different banks of the memory.
    constexpr int LEFT_PITCH = ROWS + 1, RIGHT_PITCH = SIDE + 1;
    real* left = shared<real>();
    real* right = left + DEPTH * LEFT_PITCH;
    for (int m = 0; m < M; ++m) {
        sums[m] = 0;
    }
    for (int start = p.begin; start < p.end; start += DEPTH) {
        for (int e = threadIdx.x; e < DEPTH * ROWS; e += THREADS) {
            const int k = p.left_along_k ? e % DEPTH : e / ROWS;
            const int row = p.left_along_k ? e / DEPTH : e % ROWS;
            const bool inside = start + k < p.end && first_row + row < p.rows;
            left[k * LEFT_PITCH + row] = inside ? p.left(first_row + row, start + k) : real(0);
        }
        for (int e = threadIdx.x; e < DEPTH * SIDE; e += THREADS) {
            const int k = p.right_along_k ? e % DEPTH : e / SIDE;
            const int column = p.right_along_k ? e / DEPTH : e % SIDE;
            const bool inside = start + k < p.end && first_column + column < p.columns;
            right[k * RIGHT_PITCH + column] =
                inside ? p.right(start + k, first_column + column) : real(0);
        }
        __syncthreads();
        for (int k = 0; k < DEPTH; ++k) {
            const real factor = right[k * RIGHT_PITCH + threadIdx.x / SIDE];
            for (int m = 0; m < M; ++m) {
                sums[m] += left[k * LEFT_PITCH + threadIdx.x % SIDE + m * SIDE] * factor;
            }
        }
        __syncthreads();  // before the next strip takes the place of this one
    }
}

// Where y[n, o, p, q] is; `position` counts (n, p, q).
template <typename S>
__device__ int index_of_output(S s, int position, int o) {
    const int area = s.rows * s.columns;
    return (position / area * s.maps + o) * area + position % area;
}

// What the kernel sees of a padded image x: `position` (n, p, q) of the output, `place` (c, i, j)
// in the kernel.
template <typename real, typename S>
__device__ real input_at(S s, const real* x, int position, int place) {
    const int q = position % s.columns, p = position / s.columns % s.rows;
    const int n = position / (s.columns * s.rows);
    const int j = place % s.kernel_w, i = place / s.kernel_w % s.kernel_h;
    const int c = place / (s.kernel_w * s.kernel_h);
    const int h = p * s.stride_h + i - s.padding_h, w = q * s.stride_w + j - s.padding_w;
    if (h < 0 || h >= s.height || w < 0 || w >= s.width) {
        return 0;
    }
    return x[((n * s.channels + c) * s.height + h) * s.width + w];
}

// Batch norm of one channel, γ (y - μ) / s + β; without batch norm (gamma is null), y itself.
template <typename real>
struct Normalization {
    real mean = 0, scale = 1, beta = 0;

    __device__ Normalization(const real* gammas, const real* betas, real mean_, real var, real eps,
                             int o) {
        if (gammas != nullptr) {
            mean = mean_;
            scale = gammas[o] / sqrt(var + eps);
            beta = betas[o];
        }
    }

    __device__ real operator()(real y) const { return (y - mean) * scale + beta; }
};

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

// Where the first number of an output's pooling window is in y; `item` counts (n, p, q) after
// pooling. *pooled is where the output itself is.
template <typename S>
__device__ int window_of(S s, int item, int o, int* pooled) {
    const int columns = s.columns / s.window_w, rows = s.rows / s.window_h;
    const int q = item % columns, p = item / columns % rows, n = item / (columns * rows);
    *pooled = ((n * s.maps + o) * rows + p) * columns + q;
    return ((n * s.maps + o) * s.rows + p * s.window_h) * s.columns + q * s.window_w;
}

// ------------------------------------------------------------------------------------- forward

// The next batch: x = images / 255 in `real`, and its labels.
// Example i of step number *step is the one that order[*step · stride + i] names; itself, if order
// is null. Launch: one thread a pixel of the n images. Moves n·pixels bytes in, n·pixels out.
template <typename real>
__global__ void gather(int n, int pixels, int stride, const int* step, const int* order,
                       const unsigned char* images, const int* labels, real* x, int* batch_labels) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n * pixels) {
        return;
    }
    const int place = *step * stride + i / pixels;
    const long long example = order == nullptr ? place : order[place];
    x[i] = images[example * pixels + i % pixels] / real(255);
    if (i % pixels == 0) {
        batch_labels[i / pixels] = labels[example];
    }
}

// Convolution, `functional.conv2d`:
//   y[n,o,p,q] = b[o] + Σ_cij w[o,c,i,j] x[n, c, p·s+i-pad, q·s+j-pad]
// or, where images are one pixel large, `functional.linear`. A product of two matrices, of which
// the left one, (n,p,q) × (c,i,j), is never built ("implicit GEMM").
//
// With it, unless null, the statistics that batch norm needs of y, as far as a block knows them:
// statistics[0, tile, o] is the mean, [1, tile, o] the sum of the squares about it, over the tile's
// rows, which are M·SIDE but for the last tile.
//
// Launch: grid (tiles of rows, tiles of maps). Moves x, w and b in, y out.
template <typename real, int M, typename S>
__global__ void affine(S s, int n, const real* x, const real* weight, const real* bias, real* y,
                       real* statistics) {
    const int positions = n * s.rows * s.columns;
    const int places = s.channels * s.kernel_h * s.kernel_w;
    const bool along_k = s.rows * s.columns == 1;
    const int first_row = blockIdx.x * M * SIDE, first_column = blockIdx.y * SIDE;
    real sums[M];
    tile_of_product<real>(
        product_of(
            positions, s.maps, 0, places,
            [&](int position, int place) { return input_at(s, x, position, place); }, along_k,
            [&](int place, int o) { return weight[o * places + place]; }, true),
        first_row, first_column, sums);

    const int o = first_column + threadIdx.x / SIDE, row = first_row + threadIdx.x % SIDE;
    const int count = min(M * SIDE, positions - first_row);
    real total = 0, squares = 0;
    for (int m = 0; m < M; ++m) {
        if (row + m * SIDE < positions && o < s.maps) {
            sums[m] += bias == nullptr ? real(0) : bias[o];
            total += sums[m];
            y[index_of_output(s, row + m * SIDE, o)] = sums[m];
        }
    }
    if (statistics == nullptr) {
        return;
    }
    const real mean = column_sum(total) / count;
    for (int m = 0; m < M; ++m) {
        if (row + m * SIDE < positions) {
            squares += (sums[m] - mean) * (sums[m] - mean);
        }
    }
    squares = column_sum(squares);
    if (threadIdx.x % SIDE == 0 && o < s.maps) {
        statistics[blockIdx.x * s.maps + o] = mean;
        statistics[(gridDim.x + blockIdx.x) * s.maps + o] = squares;
    }
}

// Batch norm (`functional.batch_norm`), activation (`sigmoid`, `relu`) and pooling (`avg_pool2d`,
// `max_pool2d`) of y, each or none.
//
// In training, `statistics` are what `affine` left, of `tiles` tiles with `tile_rows` rows each but
// for the last. Every block merges those of its channel, which costs less than another launch:
//   μ = Σ_t m_t μ_t / m,   m v = Σ_t (q_t + m_t (μ_t - μ)²)
// (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
// variances", 1979, (2.1b) for several parts). A channel's first block leaves μ and v in `mean` and
// `var`, and moves the moving averages. In prediction, statistics are null, and mean and var are
// read: the moving averages.
//
// Launch: grid (blocks that share a channel, channels); a thread takes every so many-th pooled
// output. Moves y and the statistics in, the output out.
template <typename real, typename S>
__global__ void activate(S s, int n, const real* y, const real* gamma, const real* beta, real eps,
                         const real* statistics, int tiles, int tile_rows, real momentum,
                         real* mean, real* var, real* moving_mean, real* moving_var,
                         real* output) {
    const int o = blockIdx.y;
    real mu = 0, v = 0;
    if (statistics != nullptr) {
        const int total = n * s.rows * s.columns;
        const real *means = statistics + o, *squares = means + tiles * s.maps;
        real sum = 0;
        for (int t = threadIdx.x; t < tiles; t += THREADS) {
            sum += min(tile_rows, total - t * tile_rows) * means[t * s.maps];
        }
        mu = block_sum(sum) / total;
        sum = 0;
        for (int t = threadIdx.x; t < tiles; t += THREADS) {
            const real d = means[t * s.maps] - mu;
            sum += squares[t * s.maps] + min(tile_rows, total - t * tile_rows) * d * d;
        }
        v = block_sum(sum) / total;
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            mean[o] = mu;
            var[o] = v;
            moving_mean[o] = momentum * moving_mean[o] + (1 - momentum) * mu;
            moving_var[o] = momentum * moving_var[o] + (1 - momentum) * v;
        }
    } else if (gamma != nullptr) {
        mu = mean[o];
        v = var[o];
    }
    const Normalization<real> normalized(gamma, beta, mu, v, eps, o);
    const int items = n * (s.rows / s.window_h) * (s.columns / s.window_w);
    for (int item = blockIdx.x * THREADS + threadIdx.x; item < items; item += gridDim.x * THREADS) {
        int pooled;
        const int first = window_of(s, item, o, &pooled);
        real result = 0;
        for (int i = 0; i < s.window_h; ++i) {
            for (int j = 0; j < s.window_w; ++j) {
                const real a = activated(s.activation, normalized(y[first + i * s.columns + j]));
                if (!s.maximum) {
                    result += a;
                } else if (i + j == 0 || a > result || a != a) {
                    result = a;
                }
            }
        }
        output[pooled] = s.maximum ? result : result / (s.window_h * s.window_w);
    }
}

// Softmax cross-entropy, `functional.softmax_cross_entropy` and its backward, and what the host
// wants to know of the step: losses[*step] is the mean loss, NaN if a label is out of range,
// hits[*step] how often the largest logit (the first of equal ones) was the label's. Then the step
// is counted.
// dlogits[n,k] = (p[n,k] - [k = label]) / n; not asked for where it is null.
// Launch: a single block; a thread takes every THREADS-th example. Moves the logits in, dlogits out.
template <typename real>
__global__ void cross_entropy(int n, int classes, const real* logits, const int* labels,
                              real* dlogits, int* step, real* losses, int* hits) {
    real loss = 0;
    int right = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const real* z = logits + i * classes;
        const int label = labels[i];
        int largest = 0;
        for (int k = 1; k < classes; ++k) {
            if (z[k] > z[largest]) {
                largest = k;
            }
        }
        real sum = 0;
        for (int k = 0; k < classes; ++k) {
            sum += exp(z[k] - z[largest]);
        }
        const bool known = 0 <= label && label < classes;
        loss += known ? log(sum) - (z[label] - z[largest]) : real(nan(""));
        right += largest == label;
        if (dlogits != nullptr) {
            for (int k = 0; k < classes; ++k) {
                const real p = exp(z[k] - z[largest]) / sum;
                dlogits[i * classes + k] = (p - (k == label ? 1 : 0)) / n;
            }
        }
    }
    loss = block_sum(loss);
    right = block_sum(right);
    if (threadIdx.x == 0) {
        losses[*step] = loss / n;
        hits[*step] = right;
        *step += 1;
    }
}

// ------------------------------------------------------------------------------------ backward

// From the gradient by the output, `doutput`, back through pooling and activation: dz, the gradient
// by what batch norm gave (or, without it, by y). Pooling and activation are computed anew from y.
// Of windows' equal maxima the first, in reading order, has the gradient.
//
// With it, for each of the blocks that share a channel, sums[0, block, o] = Σ dz (those of dβ;
// without batch norm, of the bias's gradient) and sums[1, block, o] = Σ dz (y - μ) (those of s·dγ).
//
// dz may be doutput itself where there is no pooling.
// Launch: as `activate`. Moves y and doutput in, dz out.
template <typename real, typename S>
__global__ void activate_backward(S s, int n, const real* y, const real* doutput, const real* gamma,
                                  const real* beta, real eps, const real* mean, const real* var,
                                  real* dz, real* sums) {
    const int o = blockIdx.y;
    const bool norm = gamma != nullptr;
    const real mu = norm ? mean[o] : real(0), v = norm ? var[o] : real(0);
    const Normalization<real> normalized(gamma, beta, mu, v, eps, o);
    const int items = n * (s.rows / s.window_h) * (s.columns / s.window_w);
    const real share = real(1) / (s.maximum ? 1 : s.window_h * s.window_w);
    real sum = 0, dot = 0;
    for (int item = blockIdx.x * THREADS + threadIdx.x; item < items; item += gridDim.x * THREADS) {
        int pooled, chosen = 0;
        const int first = window_of(s, item, o, &pooled);
        if (s.maximum) {
            real largest = 0;
            for (int i = 0; i < s.window_h; ++i) {
                for (int j = 0; j < s.window_w; ++j) {
                    const int at = first + i * s.columns + j;
                    const real a = activated(s.activation, normalized(y[at]));
                    if (i + j == 0 || a > largest || a != a) {
                        largest = a;
                        chosen = at;
                    }
                }
            }
        }
        const real g = doutput[pooled] * share;
        for (int i = 0; i < s.window_h; ++i) {
            for (int j = 0; j < s.window_w; ++j) {
                const int at = first + i * s.columns + j;
                const real a = activated(s.activation, normalized(y[at]));
                const bool reached = !s.maximum || at == chosen;
                const real d = reached ? g * slope(s.activation, a) : real(0);
                sum += d;
                dot += d * (y[at] - mu);
                dz[at] = d;
            }
        }
    }
    sum = block_sum(sum);
    dot = block_sum(dot);
    if (threadIdx.x == 0) {
        sums[blockIdx.x * s.maps + o] = sum;
        sums[(gridDim.x + blockIdx.x) * s.maps + o] = dot;
    }
}

// The gradient through batch norm, `functional.batch_norm_backward` (m values a channel):
//   dy = γ/s (dz - dβ/m - (y - μ) dγ/(s m)),   dβ = Σ dz,   dγ = Σ dz (y - μ) / s
// in place of dz. `sums` are those of `activate_backward`, of `blocks` blocks; every block adds up
// those of its channel, and a channel's first one leaves dβ and dγ behind.
// Launch: as `activate`, over the values of y. Moves y and dz in, dy out.
template <typename real, typename S>
__global__ void batch_norm_backward(S s, int n, const real* y, const real* gamma, real eps,
                                    const real* mean, const real* var, const real* sums, int blocks,
                                    real* dz, real* dgamma, real* dbeta) {
    const int o = blockIdx.y;
    real sum = 0, dot = 0;
    for (int b = threadIdx.x; b < blocks; b += THREADS) {
        sum += sums[b * s.maps + o];
        dot += sums[(blocks + b) * s.maps + o];
    }
    sum = block_sum(sum);
    const real root = sqrt(var[o] + eps);
    dot = block_sum(dot) / root;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        dbeta[o] = sum;
        dgamma[o] = dot;
    }
    const int m = n * s.rows * s.columns;
    const real scale = gamma[o] / root, shift = sum / m, factor = dot / (root * m), mu = mean[o];
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < m; i += gridDim.x * THREADS) {
        const int at = index_of_output(s, i, o);
        dz[at] = scale * (dz[at] - shift - (y[at] - mu) * factor);
    }
}

// The gradient by the weight, `functional.conv2d_backward` (`linear_backward`):
//   dw[o,c,i,j] = Σ_npq dy[n,o,p,q] x[n, c, p·s+i-pad, q·s+j-pad]
// The sum over (n,p,q) is long and the result small: part b of the grid's third axis adds up
// `share` of its terms, and leaves partials[b, o, c, i, j], which `sgd` adds up.
// Launch: grid (tiles of places, tiles of maps, parts). Moves x and dy in, the partial sums out.
template <typename real, int M, typename S>
__global__ void affine_backward_weight(S s, int n, int share, const real* x, const real* dy,
                                       real* partials) {
    const int positions = n * s.rows * s.columns;
    const int places = s.channels * s.kernel_h * s.kernel_w;
    const bool along_k = s.rows * s.columns > 1;
    const int first_row = blockIdx.x * M * SIDE, first_column = blockIdx.y * SIDE;
    const int begin = blockIdx.z * share;
    real sums[M];
    tile_of_product<real>(
        product_of(
            places, s.maps, begin, min(begin + share, positions),
            [&](int place, int position) { return input_at(s, x, position, place); }, along_k,
            [&](int position, int o) { return dy[index_of_output(s, position, o)]; }, along_k),
        first_row, first_column, sums);
    const int o = first_column + threadIdx.x / SIDE;
    for (int m = 0; m < M; ++m) {
        const int place = first_row + threadIdx.x % SIDE + m * SIDE;
        if (place < places && o < s.maps) {
            partials[(blockIdx.z * s.maps + o) * places + place] = sums[m];
        }
    }
}

// The gradient by the input, `functional.conv2d_backward` (`linear_backward`):
//   dx[n,c,h,w] = Σ_oij w[o,c,i,j] dy[n, o, (h+pad-i)/s, (w+pad-j)/s]
// over the i and j for which the divisions leave nothing and the results are rows and columns of y:
// every x gathers from the outputs that saw it.
// Launch: grid (tiles of the pixels (n,h,w), tiles of channels). Moves dy and w in, dx out.
template <typename real, int M, typename S>
__global__ void affine_backward_input(S s, int n, const real* dy, const real* weight, real* dx) {
    const int area = s.height * s.width, pixels = n * area;
    const int kernel = s.kernel_h * s.kernel_w;
    const bool along_k = area == 1;
    const int first_row = blockIdx.x * M * SIDE, first_column = blockIdx.y * SIDE;
    const auto gradient = [&](int pixel, int k) -> real {
        const int j = k % s.kernel_w, i = k / s.kernel_w % s.kernel_h, o = k / kernel;
        const int h = pixel % area / s.width + s.padding_h - i;
        const int w = pixel % s.width + s.padding_w - j;
        const int p = h / s.stride_h, q = w / s.stride_w;
        if (h < 0 || w < 0 || h % s.stride_h || w % s.stride_w || p >= s.rows || q >= s.columns) {
            return 0;
        }
        return dy[((pixel / area * s.maps + o) * s.rows + p) * s.columns + q];
    };
    real sums[M];
    tile_of_product<real>(
        product_of(
            pixels, s.channels, 0, s.maps * kernel, gradient, along_k,
            [&](int k, int c) {
                return weight[(k / kernel * s.channels + c) * kernel + k % kernel];
            },
            kernel > 1),
        first_row, first_column, sums);
    const int c = first_column + threadIdx.x / SIDE;
    for (int m = 0; m < M; ++m) {
        const int pixel = first_row + threadIdx.x % SIDE + m * SIDE;
        if (pixel < pixels && c < s.channels) {
            dx[(pixel / area * s.channels + c) * area + pixel % area] = sums[m];
        }
    }
}

// ---------------------------------------------------------------------------------- optimization

// The gradients' partial sums added up, and a step of `optim.SGD` for all parameters:
//   v ← momentum · v + (g + weight_decay · w),   w ← w - rate · v
// rates[i] is the learning rate of step i; `cross_entropy` has counted this step already.
// Launch: grid (blocks that share a tensor, tensors). Moves parameters, velocities and partial sums
// in; parameters, velocities and gradients out.
template <typename real>
__global__ void sgd(const Tensor* tensors, const real* partials, const int* step, const real* rates,
                    real momentum, real weight_decay, real* parameters, real* gradients,
                    real* velocities) {
    const Tensor t = tensors[blockIdx.y];
    const real rate = rates[*step - 1];
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < t.size; i += gridDim.x * THREADS) {
        const int at = t.offset + i;
        real g = t.partials == 0 ? gradients[at] : real(0);
#pragma unroll 16  // so many loads under way at a time; what they bring is still added in order
        for (int b = 0; b < t.partials; ++b) {
            g += partials[t.partial_offset + b * t.size + i];
        }
        gradients[at] = g;
        real v = t.decays ? g + weight_decay * parameters[at] : g;
        v += momentum * velocities[at];
        velocities[at] = v;
        parameters[at] -= rate * v;
    }
}
