"""The activations on float32 tiles, each with its derivative: the formulas of csrc/common/activation.h.

Every formula keeps NaN, and agrees with torch at the kinks: relu'(0) = 0, leaky_relu'(0) = slope. To add one: two
functions, and a line in activate and in derivative.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Near 0, where the difference would cancel, a polynomial: within 2e-8 of tanh(x) / x."""
    z = x * x
    near = x + x * z * (-0.33333154 + z * (0.13326092 + z * (-0.05305916 + z * 0.01726855)))
    e = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0.0, -far, far))


@triton.jit
def relu(x):
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def relu_derivative(x):
    return tl.where(x <= 0.0, 0.0, 1.0)


@triton.jit
def relu_squared(x):
    return relu(x) * relu(x)


@triton.jit
def relu_squared_derivative(x):
    return 2.0 * relu(x)


@triton.jit
def leaky_relu(x):
    return tl.where(x > 0.0, x, x * 0.01)  # torch's default slope


@triton.jit
def leaky_relu_derivative(x):
    return tl.where(x > 0.0, 1.0, 0.01)


@triton.jit
def normal_cdf(x):
    return 0.5 * tl.erf(x * 0.70710678) + 0.5


@triton.jit
def gelu(x):
    """x Phi(x), Phi the normal distribution function: Hendrycks & Gimpel 2016, arXiv:1606.08415."""
    return x * normal_cdf(x)


@triton.jit
def gelu_derivative(x):
    return x * (0.39894228 * tl.exp(x * x * -0.5)) + normal_cdf(x)


@triton.jit
def gelu_tanh(x):
    """The tanh approximation of the same paper: x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    return x * sigmoid(x * (x * x * 0.0713548163 + 1.59576912))


@triton.jit
def gelu_tanh_derivative(x):
    """The gate and 1 - gate come from e^-|2 u|: 1 - gate itself would cancel, times a slope of x^3."""
    v = x * (x * x * 0.0713548163 + 1.59576912)
    e = tl.exp(-tl.abs(v))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    slope = x * x * 0.214064449 + 1.59576912
    return x * slope * larger * smaller + tl.where(v > 0.0, larger, smaller)


@triton.jit
def quick_gelu(x):
    """x sigmoid(1.702 x): the sigmoid approximation of the same paper."""
    return x * sigmoid(x * 1.702)


@triton.jit
def quick_gelu_derivative(x):
    s = sigmoid(x * 1.702)
    return x * 1.702 * s * (1.0 - s) + s


@triton.jit
def silu(x):
    """x sigmoid(x): Elfwing, Uchibe & Doya 2017, arXiv:1702.03118."""
    return x * sigmoid(x)


@triton.jit
def silu_derivative(x):
    s = sigmoid(x)
    return x * s * (1.0 - s) + s


@triton.jit
def sigmoid_derivative(x):
    s = sigmoid(x)
    return s * (1.0 - s)


@triton.jit
def tanh_derivative(x):
    """From e^-|2 x|: 1 - tanh(x)^2 would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = relu(x)
    elif ACTIVATION == "gelu":
        x = gelu(x)
    elif ACTIVATION == "gelu_tanh":
        x = gelu_tanh(x)
    elif ACTIVATION == "quick_gelu":
        x = quick_gelu(x)
    elif ACTIVATION == "silu":
        x = silu(x)
    elif ACTIVATION == "sigmoid":
        x = sigmoid(x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "relu_squared":
        x = relu_squared(x)
    elif ACTIVATION == "leaky_relu":
        x = leaky_relu(x)
    else:
        tl.static_assert(ACTIVATION == "identity")
    return x


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    """The slope at x, which is a pre-activation."""
    if ACTIVATION == "relu":
        x = relu_derivative(x)
    elif ACTIVATION == "gelu":
        x = gelu_derivative(x)
    elif ACTIVATION == "gelu_tanh":
        x = gelu_tanh_derivative(x)
    elif ACTIVATION == "quick_gelu":
        x = quick_gelu_derivative(x)
    elif ACTIVATION == "silu":
        x = silu_derivative(x)
    elif ACTIVATION == "sigmoid":
        x = sigmoid_derivative(x)
    elif ACTIVATION == "tanh":
        x = tanh_derivative(x)
    elif ACTIVATION == "relu_squared":
        x = relu_squared_derivative(x)
    elif ACTIVATION == "leaky_relu":
        x = leaky_relu_derivative(x)
    else:
        tl.static_assert(ACTIVATION == "identity")
        x = tl.full(x.shape, 1.0, tl.float32)
    return x
