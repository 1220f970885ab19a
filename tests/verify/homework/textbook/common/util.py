import numpy as np


def im2col(images, high, wide, stride=1, pad=0):
    n, c, h, w = images.shape
    rows, columns = (h + 2 * pad - high) // stride + 1, (w + 2 * pad - wide) // stride + 1
    padded = np.pad(images, [(0, 0), (0, 0), (pad, pad), (pad, pad)], "constant")
    found = np.zeros((n, c, high, wide, rows, columns))
    for i in range(high):
        for j in range(wide):
            found[:, :, i, j] = padded[
                :, :, i : i + stride * rows : stride, j : j + stride * columns : stride
            ]
    return found.transpose(0, 4, 5, 1, 2, 3).reshape(n * rows * columns, -1)


def col2im(col, shape, high, wide, stride=1, pad=0):
    n, c, h, w = shape
    rows, columns = (h + 2 * pad - high) // stride + 1, (w + 2 * pad - wide) // stride + 1
    col = col.reshape(n, rows, columns, c, high, wide).transpose(0, 3, 4, 5, 1, 2)
    images = np.zeros((n, c, h + 2 * pad + stride - 1, w + 2 * pad + stride - 1))
    for i in range(high):
        for j in range(wide):
            images[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride] += col[
                :, :, i, j
            ]
    return images[:, :, pad : h + pad, pad : w + pad]
