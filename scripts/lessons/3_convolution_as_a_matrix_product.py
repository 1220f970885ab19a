# %% [markdown]
# # Convolution as a matrix product, and its transpose
#
# A convolution is a linear map, so a convolution is the product with a matrix. The backward pass of
# the convolution is the product with the transposed matrix. The transposed matrix explains every
# part of the backward pass. The matrix shows where the kernel goes, why gradients add up where
# windows overlap, and what stride and padding do. The second half of the lesson shows how to
# compute a convolution in practice, and why the order of the numbers in memory determines the
# speed.
#
# An `assert` checks every claim about the numbers, so the file fails if a claim is wrong. The
# lesson does not assert the speed, because the speed depends on the machine. The training code of
# npbn is in `npbn/functional/conv2d.py`.

# %%
from _lesson import BLUE, GREEN, ORANGE, draw_matrix, print_arrays, start

lesson = start()

import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from npbn import functional as F

# %% [markdown]
# ## A convolution by hand
#
# A convolution moves the kernel $w$ over the image $x$. At each place, the convolution multiplies
# the pixels under the kernel by the elements of the kernel and adds up the products. (Mathematics
# calls this operation a cross-correlation. A convolution in mathematics flips the kernel first, but
# a convolution in deep learning does not flip the kernel.)
#
# $$y_{p q} = \sum_{i, j} w_{i j}  x_{p + i,  q + j}$$

# %%
x = np.array([[1, 0, 2, 1], [0, 3, 1, 0], [2, 1, 0, 1], [1, 0, 1, 2]])
w = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])


def convolve(x: np.ndarray, w: np.ndarray, stride: int = 1) -> np.ndarray:
    k = len(w)
    places = range(0, len(x) - k + 1, stride)
    return np.array([[np.sum(w * x[p : p + k, q : q + k]) for q in places] for p in places])


y = convolve(x, w)
print_arrays(x=x, w=w, upper_left_window=x[:3, :3], times_w=w * x[:3, :3], y=y)
assert y[0, 0] == np.sum(w * x[:3, :3])

# %% [markdown]
# ## The matrix
#
# Twice the image gives twice the result, and the sum of two images gives the sum of two results. So
# the convolution is linear in $x$. Write the pixels of $x$ as a vector, row by row, and write the
# pixels of $y$ as another vector. Then there is a matrix $A$ with $y = A x$. Column $n$ of $A$ is
# the result for an image that is 1 at pixel $n$ and 0 elsewhere.

# %%
other = np.array([[5, 1, 0, 2], [1, 1, 4, 0], [0, 2, 0, 3], [3, 0, 1, 1]])
np.testing.assert_array_equal(convolve(2 * x + other, w), 2 * y + convolve(other, w))

pixels = np.eye(16, dtype=int).reshape(16, 4, 4)
A = np.stack([convolve(pixel, w).ravel() for pixel in pixels], axis=1)
np.testing.assert_array_equal(A @ x.ravel(), y.ravel())
print_arrays(A=A, A_times_x=A @ x.ravel(), y=y.ravel())

# %% [markdown]
# Each row of $A$ belongs to one place of the kernel. A row of $A$ contains the three rows of the
# kernel with zeros between the kernel rows. All rows of $A$ contain the nine numbers of the kernel,
# at different positions. (A linear layer would have 16 numbers of its own in each row, which are 64
# numbers in all four rows.)

# %%
np.testing.assert_array_equal(A[0].reshape(4, 4)[:3, :3], w)
np.testing.assert_array_equal(A[1].reshape(4, 4)[:3, 1:], w)
assert all(np.array_equal(np.sort(row[row != 0]), w.ravel()) for row in A)

figure, axes = plt.subplots(figsize=(9, 3))
draw_matrix(axes, A, r"$A$: the convolution of $4 \times 4$ pixels with $3 \times 3$ as a matrix")
axes.set_xlabel("pixel of $x$, row by row")
axes.set_ylabel("pixel of $y$")
lesson.show(figure, "matrix")

# %% [markdown]
# ## Backward: the transpose
#
# The upstream gradient $dy$ says how the loss $L$ changes with each element of $y$. Pixel $n$ of
# $x$ changes the loss through all elements of $y$, and $\partial y_m / \partial x_n = A_{m n}$. So
# the gradient of pixel $n$ is a sum over all elements of $y$:
#
# $$dx_n = \sum_m dy_m  A_{m n} \qquad\text{that is}\qquad dx = A^\top dy$$
#
# The difference quotient of a linear map is exact for a step of 1. So a check of $dx$ needs no
# small step.

# %%
dy = np.array([[1, -2], [3, 1]])
dx = (A.T @ dy.ravel()).reshape(4, 4)
print_arrays(dy=dy, dx=dx)

by_steps = [np.sum(dy * convolve(x + pixel, w)) - np.sum(dy * y) for pixel in pixels]
np.testing.assert_array_equal(dx, np.reshape(by_steps, (4, 4)))

# %% [markdown]
# A column of $A^\top$ is a row of $A$, so a column of $A^\top$ is the kernel at one place. So
# $A^\top dy$ is a sum that has one kernel for every place. The sum multiplies each kernel by the
# element of $dy$ for the place of the kernel. The forward pass *gathers* a window of pixels into
# one number. The backward pass *scatters* one number over a window of pixels.

# %%
parts = []
for p in range(2):
    for q in range(2):
        part = np.zeros((4, 4), dtype=int)
        part[p : p + 3, q : q + 3] = dy[p, q] * w
        parts.append(part)
np.testing.assert_array_equal(sum(parts), dx)

figure, row = plt.subplots(1, 5, figsize=(13, 3))
for place, (axes, part) in enumerate(zip(row, parts, strict=False)):
    title = f"$dy_{{{place // 2}{place % 2}}} = {dy.ravel()[place]}$, times $w$"
    draw_matrix(axes, part, title, largest=32)
draw_matrix(row[4], dx, "their sum: $dx$", largest=32)
lesson.show(figure, "scatter")

# %% [markdown]
# Another property of the transpose checks the backward pass without any derivative. For *all* $x$
# and $u$,
#
# $$\langle A x, u \rangle = \langle x, A^\top u \rangle$$
#
# where $\langle a, b \rangle = \sum_i a_i b_i$. (Another name of the transpose is the adjoint.) The
# equation holds for every linear map. So one evaluation of each side with random numbers checks the
# backward pass of any linear map.

# %%
rng = np.random.default_rng(0)
for _ in range(3):
    some_x, some_u = rng.normal(size=(4, 4)), rng.normal(size=(2, 2))
    left = np.sum(convolve(some_x, w) * some_u)
    right = np.sum(some_x.ravel() * (A.T @ some_u.ravel()))
    print(f"<A x, u> = {left:.12f}   <x, Aᵀ u> = {right:.12f}")
    np.testing.assert_allclose(left, right, rtol=1e-12)

# %% [markdown]
# ## im2col: write out the image, not the kernel
#
# Most elements of $A$ are zero. For 28 × 28 pixels and a kernel of 5 × 5, 97 % of the elements are
# zero. So the function `im2col` exchanges the roles of the image and the kernel. Each window of $x$
# becomes a column of a matrix $X$, and the kernel becomes a row $w$ of nine numbers. (The picture
# has a frame around the first window.) Then the small product $y = w X$ computes the convolution,
# and does not multiply by the zeros of $A$.

# %%
assert 25 / 28**2 < 0.04


def im2col(x: np.ndarray, k: int = 3, stride: int = 1) -> np.ndarray:
    """Return a matrix with one column for each window of `x`.

    A window has `k` × `k` pixels. Neighbouring windows are `stride` pixels apart.
    """
    places = range(0, len(x) - k + 1, stride)
    return np.stack([x[p : p + k, q : q + k].ravel() for p in places for q in places], axis=1)


X = im2col(x)
np.testing.assert_array_equal(w.ravel() @ X, y.ravel())
print_arrays(X=X, w_times_X=w.ravel() @ X)

figure, (left_axes, right_axes) = plt.subplots(1, 2, figsize=(8, 4.4))
draw_matrix(left_axes, np.arange(16).reshape(4, 4), "the pixels of $x$, numbered")
draw_matrix(right_axes, im2col(np.arange(16).reshape(4, 4)), "where they stand in $X$")
for axes, width, height in ((left_axes, 3, 3), (right_axes, 1, 9)):  # frame the first window
    axes.add_patch(
        Rectangle((-0.5, -0.5), width, height, fill=False, color=BLUE, linewidth=4, zorder=3)
    )
right_axes.set_xlabel("window (pixel of $y$)")
right_axes.set_ylabel("place in the window")
lesson.show(figure, "im2col")

# %% [markdown]
# ## col2im: its transpose
#
# The product $w X$ has a simple backward pass, which is $dX = w^\top dy$ and $dw = dy X^\top$. The
# transpose of `im2col` computes $dx$ from $dX$. The function `im2col` copies each pixel into every
# window that contains the pixel. The transpose of `im2col` is the function `col2im`, which adds up
# the gradients of all copies of a pixel.

# %%


def col2im(columns: np.ndarray, size: int = 4, k: int = 3, stride: int = 1) -> np.ndarray:
    """Add each column of `columns` to the window for the column, and return the image.

    `col2im` is the transpose of `im2col`. The image has `size` × `size` pixels, and a window has
    `k` × `k` pixels. Neighbouring windows are `stride` pixels apart.
    """
    x = np.zeros((size, size), columns.dtype)
    places = range(0, size - k + 1, stride)
    windows = [(p, q) for p in places for q in places]
    for (p, q), column in zip(windows, columns.T, strict=True):
        x[p : p + k, q : q + k] += column.reshape(k, k)
    return x


dX = np.outer(w.ravel(), dy.ravel())
np.testing.assert_array_equal(col2im(dX), dx)
print_arrays(dX=dX, dx=col2im(dX))

some_columns = rng.normal(size=(9, 4))
np.testing.assert_allclose(
    np.sum(im2col(some_x) * some_columns), np.sum(some_x * col2im(some_columns))
)

# %% [markdown]
# The next cell counts how many copies `im2col` makes of each pixel. To count the copies, the cell
# applies `im2col` and then `col2im` to an image of ones. With a stride of 1, a pixel in the middle
# of a large image is in $k^2$ windows, and a pixel at a corner is in one window. With a larger
# stride, a pixel is in fewer windows, and some pixels may be in no window. A pixel in no window
# does not contribute to $y$, so the gradient of such a pixel is 0.

# %%
strides = (1, 2, 3)
counts = [col2im(im2col(np.ones((7, 7)), 3, s), 7, 3, s) for s in strides]
assert counts[0][3, 3] == 9 and counts[0][0, 0] == 1
assert np.max(counts[1]) == 4 and np.max(counts[2]) == 1
assert np.all(counts[2][6] == 0) and np.all(counts[2][:, 6] == 0)

figure, row = plt.subplots(1, 3, figsize=(11, 4))
for axes, stride, count in zip(row, strides, counts, strict=True):
    draw_matrix(axes, count, f"stride {stride}")
figure.suptitle(r"In how many windows of $3 \times 3$ is each pixel of $7 \times 7$?")
lesson.show(figure, "counts")

# %% [markdown]
# ## The gradients of kernel and bias
#
# The forward pass multiplies each weight by one row of $X$, which contains one pixel of every
# window. So the gradient of the weight is the sum over all windows of $dy$ times the pixel of the
# window. For all weights together, the gradient is $dw = dy X^\top$. The forward pass adds the bias
# to every element of $y$, so the gradient $db$ is the sum of $dy$. The result $y$ is linear in the
# weight and in the bias, so a step of 1 checks both gradients.

# %%
dw = (dy.ravel() @ X.T).reshape(3, 3)
db = np.sum(dy)
print_arrays(dw=dw, db=db)

weights = np.eye(9, dtype=int).reshape(9, 3, 3)
by_steps = [np.sum(dy * convolve(x, w + weight)) - np.sum(dy * y) for weight in weights]
np.testing.assert_array_equal(dw, np.reshape(by_steps, (3, 3)))
assert db == np.sum(dy * (y + 1)) - np.sum(dy * y)

# %% [markdown]
# ## Stride and padding are matrices as well
#
# **Padding** writes the image into a larger image of zeros. Padding is the product with a matrix
# $P$ that has a single 1 in each column. **Stride** keeps some elements of the result at stride 1
# and drops the other elements. Stride is the product with a matrix $S$ that has a single 1 in each
# row. Let $A$ be the matrix of the convolution of the padded image. The convolution with padding
# and stride, and the backward pass of this convolution, are the products
#
# $$y = S A P x \qquad dx = P^\top A^\top S^\top dy$$
#
# The backward pass applies the three matrices from right to left. First, $S^\top$ puts the elements
# of $dy$ back in place, with zeros between the elements. Then $A^\top$ scatters the kernels.
# Finally, $P^\top$ cuts the padding off.

# %%
P = np.stack([np.pad(pixel, 1).ravel() for pixel in pixels], axis=1)
larger = np.eye(36, dtype=int).reshape(36, 6, 6)
A_padded = np.stack([convolve(pixel, w).ravel() for pixel in larger], axis=1)
S = np.stack([pixel[::2, ::2].ravel() for pixel in pixels], axis=1)
assert np.all(np.sum(P, axis=0) == 1) and np.all(np.sum(S, axis=1) == 1)

y_strided = convolve(np.pad(x, 1), w, stride=2)
np.testing.assert_array_equal(S @ A_padded @ P @ x.ravel(), y_strided.ravel())

spread = (S.T @ dy.ravel()).reshape(4, 4)
np.testing.assert_array_equal(spread[::2, ::2], dy)
assert np.sum(spread != 0) == 4
dx_padded = (A_padded.T @ spread.ravel()).reshape(6, 6)
dx_strided = (P.T @ dx_padded.ravel()).reshape(4, 4)
np.testing.assert_array_equal(dx_strided, dx_padded[1:-1, 1:-1])
np.testing.assert_array_equal(dx_strided.ravel(), (S @ A_padded @ P).T @ dy.ravel())
print_arrays(y_strided=y_strided, dy_spread_out=spread, dx_padded=dx_padded, dx_strided=dx_strided)

figure, row = plt.subplots(1, 4, figsize=(13, 6.6), width_ratios=(16, 36, 16, 16))
draw_matrix(row[0], S, "$S$: every second\nrow and column", numbers=False)
draw_matrix(row[1], A_padded, r"$A$, for $6 \times 6$ pixels", numbers=False)
draw_matrix(row[2], P, "$P$: into a frame\nof zeros", numbers=False)
draw_matrix(row[3], S @ A_padded @ P, "the product $S A P$", numbers=False)
for axes, matrix in zip(row, (S, A_padded, P, S @ A_padded @ P), strict=True):
    axes.set_xlabel(rf"${matrix.shape[0]} \times {matrix.shape[1]}$")
lesson.show(figure, "stride_and_padding")

# %% [markdown]
# ## Channels and batches: npbn's conv2d
#
# With $C$ channels, a column of $X$ contains the windows of all channels under one another, so the
# column has $C k^2$ numbers. With $O$ kernels, the matrix $W$ of the weights has $O$ rows. With $N$
# images, the columns of all images stand side by side in $X$. So the complete formula is
# $Y = W X + b \mathbf{1}^\top$. The next cell computes this formula and compares the result with
# the result of npbn. npbn computes one row of the output image at a time.

# %%
images = rng.normal(size=(2, 3, 7, 7))
weight = rng.normal(size=(4, 3, 3, 3))
bias = rng.normal(size=4)
padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))

columns = np.concatenate(
    [np.concatenate([im2col(channel, 3, stride=2) for channel in image]) for image in padded],
    axis=1,
)
Y = weight.reshape(4, 27) @ columns + bias[:, None]
npbn_y, cache = F.conv2d(images, weight, bias, stride=2, padding=1)
print(f"W: {weight.reshape(4, 27).shape}, X: {columns.shape}, Y: {Y.shape}, y: {npbn_y.shape}")
np.testing.assert_allclose(Y.reshape(4, 2, 4, 4).transpose(1, 0, 2, 3), npbn_y, atol=1e-13)

upstream = rng.normal(size=npbn_y.shape)
dY = upstream.transpose(1, 0, 2, 3).reshape(4, -1)
dcolumns = (weight.reshape(4, 27).T @ dY).reshape(3, 9, 2, 16)
dpadded = [[col2im(dcolumns[c, :, n], 9, 3, stride=2) for c in range(3)] for n in range(2)]

npbn_dx, npbn_dweight, npbn_dbias = F.conv2d_backward(upstream, cache)
assert npbn_dbias is not None  # only a convolution without a bias has no npbn_dbias
for name, gradient, npbn_gradient in (
    ("dx", np.array(dpadded)[:, :, 1:-1, 1:-1], npbn_dx),
    ("dweight", (dY @ columns.T).reshape(4, 3, 3, 3), npbn_dweight),
    ("dbias", np.sum(dY, axis=1), npbn_dbias),
):
    print(f"{name}: largest difference {np.max(np.abs(gradient - npbn_gradient)):.1e}")
    np.testing.assert_allclose(gradient, npbn_gradient, atol=1e-13)

# %% [markdown]
# ## Memory order decides the speed
#
# The loops of `im2col` and `col2im` above are easy to read, but slow. Fast code goes through the
# $k^2$ places in the window. For each place, fast code copies the pixels at this place of *all*
# windows at once, with one slice. The speed of such a copy depends on the order of the numbers in
# memory.
#
# In NumPy's usual order, the last axis of an array of shape $(N, C, H, W)$ is contiguous, so the
# pixels of an image row are neighbours in memory. The slice leaves out $k - 1$ pixels of every row,
# so NumPy copies the slice in *runs* of $W'$ contiguous numbers. In LeNet, a run has 8 to 24
# numbers. With a stride of 2, a run has only one number. If the batch is the last axis in memory,
# the order is $(C, H, W, N)$. In this order, the values of one pixel in all images are a run of $N$
# numbers, at any stride.
#
# For each run, NumPy restarts an inner loop, and the restart takes as long as many numbers take.
# Unfolding (`im2col`) copies numbers, and folding (the transpose of `im2col`) adds numbers. The
# next cell copies and adds a fixed amount of numbers in runs of different lengths, with gaps of 4
# numbers between the runs.

# %%


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Run each of the `functions` and return the median time of each function in milliseconds.

    The functions run in turns, for `repeats` rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):  # the first round only warms up
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    return {name: 1000 * float(np.median(values[1:])) for name, values in seconds.items()}


def copy(runs: np.ndarray, buffer: np.ndarray) -> Callable[[], object]:
    return lambda: np.copyto(buffer, runs)


def add(runs: np.ndarray, buffer: np.ndarray) -> Callable[[], object]:
    return lambda: np.add(runs, buffer, out=runs)


repeats = 5 if lesson.quick else 51
amount = 2**17
lengths = 2 ** np.arange(2, 10)
functions = {}
for length in lengths.tolist():
    runs = np.zeros((amount // length, length + 4), np.float32)[:, :length]
    buffer = np.zeros(runs.shape, np.float32)
    functions[f"copy {length}"] = copy(runs, buffer)
    functions[f"add {length}"] = add(runs, buffer)
timed = medians(functions, repeats)
nanoseconds = {
    name: np.array([1e6 * timed[f"{name} {length}"] / amount for length in lengths])
    for name in ("copy", "add")
}
print("ns per number, in runs of")
print_arrays(lengths=lengths, **nanoseconds)

figure, axes = plt.subplots(figsize=(7.5, 4))
for (name, values), colour in zip(nanoseconds.items(), (BLUE, ORANGE), strict=True):
    axes.plot(lengths, values, "o-", color=colour, linewidth=2)
    axes.annotate(name, (lengths[0], values[0]), (8, 0), textcoords="offset points", va="center")
axes.axvspan(8, 24, color="0.88", zorder=0)
axes.axvline(256, color="0.6", zorder=0)
axes.set_xscale("log", base=2)
axes.set_xticks(lengths, labels=[str(length) for length in lengths])
axes.set_ylim(bottom=0)
top = axes.get_ylim()[1]
axes.text(np.sqrt(8 * 24), 0.96 * top, "image rows\nin LeNet", ha="center", va="top")
axes.text(244, 0.96 * top, "batch of 256", ha="right", va="top")
axes.set_xlabel("numbers in a run")
axes.set_ylabel("ns per number")
axes.set_title("The same amount in runs of different lengths")
lesson.show(figure, "runs")

# %% [markdown]
# The next cell computes the second convolution of LeNet in three ways. Each image has 6 channels of
# 12 × 12 pixels. The convolution has 16 kernels of 5 × 5, and all numbers are float32.
#
# - *Batch first* unfolds images in the order $(N, C, H, W)$, in runs of $W' = 8$ numbers.
# - *Batch last* unfolds images in the order $(C, H, W, N)$.
# - *Strips* is the way of npbn. The batch is last, and images are unfolded only along the width. A
#   strip belongs to one row of the image. The matrix $X_p$ for row $p$ of the output consists of
#   $k$ strips under one another, which are a contiguous block of memory. The block for the next
#   output row begins one strip further down. So npbn copies a number up to $k$ times, not $k^2$
#   times. A block has only $1 / H'$ of the size of the whole $X$, so the block can stay in the
#   cache of the processor during the multiplication.
#
# Unfolding and folding (`im2col` and the transpose of `im2col`) move numbers, and the product
# computes. The times do not include bringing the images into the order $(C, H, W, N)$. npbn
# reorders the images only once, and then each layer of npbn passes on results in the order
# $(C, H, W, N)$.

# %%
N, C, H, out, k = 64 if lesson.quick else 256, 6, 12, 16, 5
H_out = H - k + 1
first = rng.normal(size=(N, C, H, H)).astype(np.float32)  # the order in memory is N, C, H, W
last = np.ascontiguousarray(first.transpose(1, 2, 3, 0))  # the order in memory is C, H, W, N
kernels = rng.normal(size=(out, C, k, k)).astype(np.float32)
kernels_by_row = kernels.transpose(0, 2, 1, 3).reshape(out, -1)

# The buffers for the unfolded images and for the results exist before the clock starts.
X_first = np.empty((C, k, k, N, H_out, H_out), np.float32)
X_last = np.empty((C, k, k, H_out, H_out, N), np.float32)
strips = np.empty((H, C, k, H_out, N), np.float32)
Y_first, Y_last, Y_strips = (np.empty((out, H_out**2 * N), np.float32) for _ in range(3))
dx_first, dx_last, dx_strips = np.empty_like(first), np.empty_like(last), np.empty_like(last)
places = [(i, j, slice(i, i + H_out), slice(j, j + H_out)) for i in range(k) for j in range(k)]


def unfold_first() -> None:
    for i, j, rows, columns in places:
        X_first[:, i, j] = first[:, :, rows, columns].transpose(1, 0, 2, 3)


def unfold_last() -> None:
    for i, j, rows, columns in places:
        X_last[:, i, j] = last[:, rows, columns]


def unfold_strips() -> None:
    for j in range(k):
        strips[:, :, j] = last[:, :, j : j + H_out].transpose(1, 0, 2, 3)


def multiply_first() -> None:
    np.matmul(kernels.reshape(out, -1), X_first.reshape(C * k * k, -1), out=Y_first)


def multiply_last() -> None:
    np.matmul(kernels.reshape(out, -1), X_last.reshape(C * k * k, -1), out=Y_last)


def multiply_strips() -> None:
    for p, Y_p in enumerate(np.split(Y_strips, H_out, axis=1)):
        Y_p[:] = kernels_by_row @ strips[p : p + k].reshape(k * C * k, -1)


def fold_first() -> None:
    dx_first[:] = 0
    for i, j, rows, columns in places:
        dx_first[:, :, rows, columns] += X_first[:, i, j].transpose(1, 0, 2, 3)


def fold_last() -> None:
    dx_last[:] = 0
    for i, j, rows, columns in places:
        dx_last[:, rows, columns] += X_last[:, i, j]


def fold_strips() -> None:
    dx_strips[:] = 0
    for j in range(k):
        dx_strips[:, :, j : j + H_out] += strips[:, :, j].transpose(1, 0, 2, 3)


ways = {
    "batch first": (unfold_first, multiply_first, fold_first),
    "batch last": (unfold_last, multiply_last, fold_last),
    "strips": (unfold_strips, multiply_strips, fold_strips),
}
steps = ("unfold", "multiply", "fold")
timed = medians(
    {f"{way}, {step}": f for way, fs in ways.items() for step, f in zip(steps, fs, strict=True)},
    repeats,
)

# %% [markdown]
# All three ways compute the same results. The measurement above folded the unfolded image, not a
# gradient. So folding multiplies every pixel by the number of copies of the pixel. The next cell
# compares the folded images with this product, which checks unfolding and folding.

# %%
expected = F.conv2d(first, kernels)[0]
for result in (
    Y_first.reshape(out, N, H_out, H_out).transpose(1, 0, 2, 3),
    Y_last.reshape(out, H_out, H_out, N).transpose(3, 0, 1, 2),
    Y_strips.reshape(out, H_out, H_out, N).transpose(3, 0, 1, 2),
):
    np.testing.assert_allclose(result, expected, atol=1e-3)

ones = np.ones((H, H))
np.testing.assert_allclose(dx_first, first * col2im(im2col(ones, k), H, k), rtol=1e-5)
np.testing.assert_array_equal(dx_last.transpose(3, 0, 1, 2), dx_first)
copies_along_width = np.convolve(np.ones(H_out), np.ones(k))
np.testing.assert_allclose(dx_strips, last * copies_along_width[:, None], rtol=1e-5)
assert X_first.size == X_last.size == k**2 * H_out**2 * C * N
assert strips.size == k * H * H_out * C * N
assert strips[:k].size * H_out == X_last.size
assert expected.transpose(1, 2, 3, 0).flags.c_contiguous

print("                 unfold  multiply      fold        MB unfolded")
for way, unfolded in zip(ways, (X_first, X_last, strips), strict=True):
    row_of_times = "".join(f"{timed[f'{way}, {step}']:7.2f} ms" for step in steps)
    print(f"{way:13}{row_of_times}  {unfolded.nbytes / 1e6:10.1f}")

figure, axes = plt.subplots(figsize=(8, 3.4))
starts = np.zeros(3)
for step, colour in zip(steps, (BLUE, ORANGE, GREEN), strict=True):
    widths = np.array([timed[f"{way}, {step}"] for way in ways])
    axes.barh(list(ways), widths, left=starts, color=colour, label=step)
    starts += widths
axes.invert_yaxis()
axes.set_xlabel(f"ms for a batch of {N} (median of {repeats})")
axes.set_title(r"The same convolution in three ways: 6 to 16 channels, $5 \times 5$")
axes.legend(loc="lower right")
lesson.show(figure, "memory_order")

# %% [markdown]
# The product takes about as long in all three ways, because the arithmetic is the same. The other
# differences come from the order of the numbers in memory. The following times were measured on two
# cores of an AMD EPYC that was busy with other programs. For a batch of 256, unfolding and folding
# took 12 to 22 ms with the batch first, 3 ms with the batch last, and 1 ms in strips. The product
# took 5 to 7 ms.
