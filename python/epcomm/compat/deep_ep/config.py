"""`Config`, its recommended values and the size hints of `deep_ep`.

epcomm sizes its memory itself, so of a Config only `num_sms` has an effect; the hints are for
callers that compute with them. Formulae and tables: DeepEP `csrc/config.hpp` and
`deep_ep/buffers/legacy.py`, https://github.com/deepseek-ai/DeepEP (2.1.0).
"""

from __future__ import annotations

_ALIGNMENT = 128  # bytes that buffer sizes are multiples of
_NVL_PEERS = 8  # most ranks of one node
_TOPK = 128  # top-k and scales that the hints make room for
_SCALES = 128
_SOURCE_META_BYTES = 8
# Beside its payload: metadata, expert ids (int64), weights and scales (fp32).
_TOKEN_BYTES = _SOURCE_META_BYTES + _TOPK * (8 + 4) + _SCALES * 4


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


class Config:
    """Tuning of deep_ep's normal kernels. RuntimeError if a send chunk does not fit its receive."""

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        nvl_send, nvl_recv = num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens
        rdma_send, rdma_recv = num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens
        _expect(num_sms >= 0, f"num_sms is {num_sms}; expected at least 0")
        _expect(
            0 < nvl_send < nvl_recv,
            f"num_max_nvl_chunked_send_tokens is {nvl_send}; expected more than 0, less than "
            f"num_max_nvl_chunked_recv_tokens = {nvl_recv}",
        )
        _expect(
            min(rdma_send, rdma_recv) > 0,
            f"num_max_rdma_chunked_send_tokens and _recv_tokens are {rdma_send} and {rdma_recv}; "
            "expected more than 0",
        )
        rdma_recv = _align(rdma_recv, rdma_send)
        _expect(
            rdma_send <= rdma_recv // 2,
            f"num_max_rdma_chunked_send_tokens is {rdma_send}; expected at most half of "
            f"num_max_rdma_chunked_recv_tokens = {rdma_recv}",
        )
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = nvl_send
        self.num_max_nvl_chunked_recv_tokens = nvl_recv
        self.num_max_rdma_chunked_send_tokens = rdma_send
        self.num_max_rdma_chunked_recv_tokens = rdma_recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes that deep_ep needs on NVLink for rows of hidden_bytes. epcomm needs none."""
        _expect(
            num_ranks < _NVL_PEERS or num_ranks % _NVL_PEERS == 0,
            f"num_ranks is {num_ranks}; expected less than 8, or a multiple of 8",
        )
        nodes = max(num_ranks // _NVL_PEERS, 1)
        lanes = self.num_sms // 2 * min(num_ranks, _NVL_PEERS)
        tokens = lanes * self.num_max_nvl_chunked_recv_tokens
        return _align(
            lanes * (2 * nodes + 3) * 4 + tokens * (hidden_bytes + _TOKEN_BYTES), _ALIGNMENT
        )

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes that deep_ep needs for RDMA; 0 for up to 8 ranks. epcomm needs none."""
        if num_ranks <= _NVL_PEERS:
            return 0
        _expect(
            num_ranks % _NVL_PEERS == 0 and self.num_sms % 2 == 0,
            f"num_ranks is {num_ranks} and num_sms {self.num_sms}; expected a multiple of 8 and an "
            "even number",
        )
        lanes = self.num_sms // 2 * (num_ranks // _NVL_PEERS)
        tokens = lanes * self.num_max_rdma_chunked_recv_tokens
        return _align(
            2 * lanes * (2 * _NVL_PEERS + 2) * 4 + 2 * tokens * (hidden_bytes + _TOKEN_BYTES + 16),
            _ALIGNMENT,
        )


def get_low_latency_rdma_size_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """Bytes that deep_ep needs for its low-latency calls. epcomm needs none of them."""
    tokens, scales = num_max_dispatch_tokens_per_rank, hidden // 128
    dispatch_row = 16 + max(hidden * 2, hidden + scales * 4)
    combine_row = scales * 4 + hidden * 2
    send = max(tokens * dispatch_row, num_experts * tokens * combine_row)
    receive = num_experts * tokens * max(dispatch_row, combine_row)
    signals = _align(num_experts * 4, _ALIGNMENT)
    # The binary rounds up past a multiple, too.
    return (2 * (send + receive + signals) // _ALIGNMENT + 1) * _ALIGNMENT


# num_ranks: (NVLink send, NVLink receive, RDMA send, RDMA receive) tokens per chunk
_DISPATCH = {
    2: (24, 256, 6, 128),
    4: (6, 256, 6, 128),
    8: (6, 256, 6, 128),
    16: (36, 288, 20, 128),
    24: (32, 288, 8, 128),
    32: (32, 288, 8, 128),
    48: (32, 288, 8, 128),
    64: (32, 288, 8, 128),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
_COMBINE = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    24: (1, 288, 8, 128),
    32: (1, 288, 8, 128),
    48: (1, 288, 8, 128),
    64: (1, 288, 8, 128),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    144: (2, 720, 8, 128),
    160: (2, 720, 8, 128),
}


def _recommended(table: dict[int, tuple[int, int, int, int]], num_ranks: int, sms: int) -> Config:
    # deep_ep asserts; callers that catch it catch this.
    if num_ranks not in table:
        known = ", ".join(map(str, table))
        raise AssertionError(f"num_ranks is {num_ranks}; expected one of {known}")
    return Config(sms, *table[num_ranks])


def dispatch_config(num_ranks: int, num_sms: int) -> Config:
    """deep_ep's recommendation for dispatch. AssertionError where it has none."""
    return _recommended(_DISPATCH, num_ranks, num_sms)


def combine_config(num_ranks: int, num_sms: int) -> Config:
    """deep_ep's recommendation for combine. AssertionError where it has none."""
    return _recommended(_COMBINE, num_ranks, num_sms)
