import numpy as np


class Linear:
    def __init__(self, in_features, out_features, debug=False):
        self.W = np.zeros((out_features, in_features))
        self.b = np.zeros((out_features, 1))
        self.debug = debug

    def forward(self, A):
        self.A = A
        self.N = A.shape[0]
        self.Ones = np.ones((self.N, 1))
        return A @ self.W.T + self.Ones @ self.b.T

    def backward(self, dLdZ):
        dLdA = dLdZ @ self.W
        self.dLdW = dLdZ.T @ self.A
        self.dLdb = dLdZ.T @ self.Ones
        return dLdA


class Sigmoid:
    def forward(self, Z):
        self.A = 1 / (1 + np.exp(-Z))
        return self.A

    def backward(self, dLdA):
        return dLdA * self.A * (1 - self.A)


class ReLU:
    def forward(self, Z):
        self.A = np.maximum(Z, 0)
        return self.A

    def backward(self, dLdA):
        return dLdA * (self.A > 0)


class CrossEntropyLoss:
    def forward(self, A, Y):
        self.A, self.Y = A, Y
        self.N, self.C = A.shape
        e = np.exp(A - A.max(axis=1, keepdims=True))
        self.softmax = e / e.sum(axis=1, keepdims=True)
        crossentropy = (-Y * np.log(self.softmax)) @ np.ones((self.C, 1))
        return (np.ones((1, self.N)) @ crossentropy / self.N)[0, 0]

    def backward(self):
        return (self.softmax - self.Y) / self.N


class BatchNorm1d:
    def __init__(self, num_features, alpha=0.9):
        self.alpha, self.eps = alpha, 1e-8
        self.BW, self.Bb = np.ones((1, num_features)), np.zeros((1, num_features))
        self.dLdBW, self.dLdBb = np.zeros((1, num_features)), np.zeros((1, num_features))
        self.running_M, self.running_V = np.zeros((1, num_features)), np.ones((1, num_features))

    def forward(self, Z, eval=False):
        self.Z = Z
        if eval:
            self.NZ = (Z - self.running_M) / np.sqrt(self.running_V + self.eps)
            return self.BW * self.NZ + self.Bb
        self.N = Z.shape[0]
        self.M = np.mean(Z, axis=0, keepdims=True)
        self.V = np.var(Z, axis=0, keepdims=True)
        self.NZ = (Z - self.M) / np.sqrt(self.V + self.eps)
        self.running_M = self.alpha * self.running_M + (1 - self.alpha) * self.M
        self.running_V = self.alpha * self.running_V + (1 - self.alpha) * self.V
        return self.BW * self.NZ + self.Bb

    def backward(self, dLdBZ):
        self.dLdBW = np.sum(dLdBZ * self.NZ, axis=0, keepdims=True)
        self.dLdBb = np.sum(dLdBZ, axis=0, keepdims=True)
        d = dLdBZ * self.BW
        r = 1 / np.sqrt(self.V + self.eps)
        dV = -0.5 * np.sum(d * (self.Z - self.M), axis=0) * r**3
        dM = -np.sum(d * r, axis=0) - 2 / self.N * dV * np.sum(self.Z - self.M, axis=0)
        return d * r + dV * 2 / self.N * (self.Z - self.M) + dM / self.N


class Conv2d_stride1:
    def __init__(
        self, in_channels, out_channels, kernel_size, weight_init_fn=None, bias_init_fn=None
    ):
        self.kernel_size = kernel_size
        if weight_init_fn is None:
            self.W = np.random.normal(0, 1.0, (out_channels, in_channels, kernel_size, kernel_size))
        else:
            self.W = weight_init_fn(out_channels, in_channels, kernel_size, kernel_size)
        self.b = np.zeros(out_channels) if bias_init_fn is None else bias_init_fn(out_channels)
        self.dLdW, self.dLdb = np.zeros(self.W.shape), np.zeros(self.b.shape)

    def forward(self, A):
        self.A = A
        k = self.kernel_size
        n, _, h, w = A.shape
        Z = np.zeros((n, len(self.W), h - k + 1, w - k + 1))
        for i in range(Z.shape[2]):
            for j in range(Z.shape[3]):
                Z[:, :, i, j] = np.tensordot(
                    A[:, :, i : i + k, j : j + k], self.W, axes=([1, 2, 3], [1, 2, 3])
                )
        return Z + self.b[None, :, None, None]

    def backward(self, dLdZ):
        k = self.kernel_size
        dLdA, self.dLdW = np.zeros(self.A.shape), np.zeros(self.W.shape)
        for i in range(dLdZ.shape[2]):
            for j in range(dLdZ.shape[3]):
                self.dLdW += np.tensordot(
                    dLdZ[:, :, i, j], self.A[:, :, i : i + k, j : j + k], axes=([0], [0])
                )
                dLdA[:, :, i : i + k, j : j + k] += np.tensordot(
                    dLdZ[:, :, i, j], self.W, axes=([1], [0])
                )
        self.dLdb = dLdZ.sum(axis=(0, 2, 3))
        return dLdA


class Downsample2d:
    def __init__(self, downsampling_factor):
        self.downsampling_factor = downsampling_factor

    def forward(self, A):
        self.shape = A.shape
        return A[:, :, :: self.downsampling_factor, :: self.downsampling_factor]

    def backward(self, dLdZ):
        found = np.zeros(self.shape)
        found[:, :, :: self.downsampling_factor, :: self.downsampling_factor] = dLdZ
        return found


class Conv2d:
    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding=0,
        weight_init_fn=None,
        bias_init_fn=None,
    ):
        self.stride, self.pad = stride, padding
        self.conv2d_stride1 = Conv2d_stride1(
            in_channels, out_channels, kernel_size, weight_init_fn, bias_init_fn
        )
        self.downsample2d = Downsample2d(stride)

    def forward(self, A):
        A = np.pad(A, ((0, 0), (0, 0), (self.pad, self.pad), (self.pad, self.pad)))
        return self.downsample2d.forward(self.conv2d_stride1.forward(A))

    def backward(self, dLdZ):
        d = self.conv2d_stride1.backward(self.downsample2d.backward(dLdZ))
        p = self.pad
        return d[:, :, p : d.shape[2] - p, p : d.shape[3] - p]
