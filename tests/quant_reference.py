"""Oracle: quantised rows from the definitions of the formats. numpy, tables and search, nothing of
epcomm: codes are found by looking for the nearest value, not by arithmetic on bits.
"""

import numpy as np

Array = np.ndarray
F32 = np.float32


def magnitudes(mantissa: int, bias: int, count: int) -> Array:
    """Values of the codes 0, 1, ... of a small float, ascending."""
    codes = np.arange(count)
    exponent, fraction = codes >> mantissa, (codes % 2**mantissa) / 2.0**mantissa
    normal = (1 + fraction) * 2.0 ** (exponent - bias)
    return np.where(exponent == 0, fraction * 2.0 ** (1 - bias), normal)


E4M3 = magnitudes(3, 7, 127)
E2M1 = magnitudes(1, 1, 8)
E4M3_BYTES = np.concatenate([E4M3, [np.nan], -E4M3, [np.nan]]).astype(F32)
E2M1_NIBBLES = np.concatenate([E2M1, -E2M1]).astype(F32)


def nearest(values: Array, table: Array) -> Array:
    """Code of the nearest of the table's magnitudes, the even one of two; NaN gives the last."""
    x = np.abs(values.astype(np.float64))
    middle = (table[1:] + table[:-1]) / 2
    low, high = np.searchsorted(middle, x, "left"), np.searchsorted(middle, x, "right")
    return np.where(low == high, low, np.where(low % 2 == 0, low, high))


def e4m3(values: Array) -> Array:
    codes = nearest(values, E4M3) | np.where(np.signbit(values), 0x80, 0)
    return np.where(np.isnan(values), 0x7F, codes).astype(np.uint8)


def e2m1(values: Array) -> Array:
    codes = nearest(values, E2M1) | np.where(np.signbit(values), 8, 0)
    return np.where(np.isnan(values), 7, codes).astype(np.uint8)


def global_scale(x: Array) -> Array:
    """float32 scalar: the largest finite magnitude / (448 * 6)."""
    finite = np.abs(x[np.isfinite(x)])
    amax = finite.max() if finite.size else F32(0)
    return F32(1) if amax == 0 else max(F32(amax) / F32(2688), F32(2.0**-117))


def _fp8_scale(amax: Array) -> tuple[Array, Array]:
    scale = np.maximum(amax / F32(448), F32(2.0**-126))  # NaN stays
    scale = np.where(amax == 0, F32(1), scale).astype(F32)
    scale[np.isnan(amax)] = np.nan  # the one NaN 0x7fc00000, whichever was among the elements
    return scale, scale[..., None].view(np.uint8)


def _ue8m0_scale(amax: Array) -> tuple[Array, Array]:
    wanted = amax.astype(np.float64) / 448
    mantissa, exponent = np.frexp(wanted)  # wanted = mantissa * 2^exponent, mantissa >= 0.5
    exponent = np.maximum(np.where(mantissa == 0.5, exponent - 1, exponent), -126)
    exponent = np.where(amax == 0, 0, exponent)
    good = np.isfinite(amax)
    codes = np.where(good, exponent + 127, 255).astype(np.uint8)
    return np.where(good, 2.0 ** np.where(good, exponent, 0), np.nan).astype(F32), codes


def quantise(x: Array, quant: str, scale_of_all: float = 1.0) -> tuple[Array, Array]:
    """Bytes of q [T, row_bytes] and of the scales [T, ...] of float32 rows."""
    tokens, hidden = x.shape
    with np.errstate(all="ignore"):
        if quant == "nvfp4":
            groups, g = x.reshape(tokens, hidden // 16, 16), F32(scale_of_all)
            amax = np.abs(groups).max(axis=2)
            codes = e4m3(amax * (F32(1) / (F32(6) * g)))
            codes = np.where(np.isfinite(amax), codes, 0x7F).astype(np.uint8)
            scale = E4M3_BYTES[codes] * g
            inverse = np.where(codes == 0, F32(0), F32(1) / scale).astype(F32)
            q = e2m1(groups * inverse[..., None]).reshape(tokens, hidden)
            return q[:, ::2] | q[:, 1::2] << 4, codes
        groups = x.reshape(tokens, hidden // 128, 128)
        amax = np.abs(groups).max(axis=2)
        scale, stored = (_fp8_scale if quant == "fp8" else _ue8m0_scale)(amax)
        inverse = np.where(np.isfinite(scale), F32(1) / scale, F32(np.nan)).astype(F32)
        q = e4m3(groups * inverse[..., None]).reshape(tokens, hidden)
        stored = stored.reshape(tokens, hidden // 128 * (4 if quant == "fp8" else 1))
        return q, np.pad(stored, ((0, 0), (0, -stored.shape[1] % 4)))


def dequantise(q: Array, scales: Array, quant: str, scale_of_all: Array | float = 1.0) -> Array:
    """float32 [T, H] from the bytes; scale_of_all: one number, or one per row [T, 1]."""
    with np.errstate(all="ignore"):
        if quant == "nvfp4":
            nibbles = np.stack([q & 15, q >> 4], axis=2).reshape(len(q), q.shape[1] // 8, 16)
            scale = E4M3_BYTES[scales] * np.asarray(scale_of_all, dtype=F32)
            return (E2M1_NIBBLES[nibbles] * scale[..., None]).reshape(len(q), 2 * q.shape[1])
        codes = q.reshape(len(q), q.shape[1] // 128, 128)
        if quant == "fp8":
            scale = scales.view(F32)
        else:
            power = 2.0 ** (scales.astype(np.float64) - 127)
            scale = np.where(scales == 255, np.nan, power).astype(F32)[:, : codes.shape[1]]
        return (E4M3_BYTES[codes] * scale[..., None]).reshape(q.shape)


def swizzle(scales: Array) -> Array:
    """Tiles of 128 rows and 4 columns, flat; within a tile row r, column c is byte
    (r % 32) * 16 + (r // 32) * 4 + c. Zeros fill up the last tiles.
    """
    rows, columns = scales.shape
    padded = np.pad(scales, ((0, -rows % 128), (0, -columns % 4)))
    tiles = padded.reshape(-1, 4, 32, padded.shape[1] // 4, 4)  # tile, r // 32, r % 32, tile, c
    return tiles.transpose(0, 3, 2, 1, 4).reshape(-1)
