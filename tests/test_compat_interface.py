"""The surface of deep_ep: imports, signatures, size hints, and the ways in."""

import inspect
import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest

SHIM = Path(__file__).parents[1] / "packaging" / "deep_ep"


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ok(code: str, **env: str) -> list[str]:
    done = run_python(code, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# name of the method: its parameters without self, as reference callers write them.
V1 = {
    "get_dispatch_layout": "topk_idx, num_experts, previous_event=None, async_finish=False, "
    "allocate_on_comm_stream=False",
    "dispatch": "x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, "
    "is_token_in_rank=None, num_tokens_per_expert=None, topk_idx=None, topk_weights=None, "
    "expert_alignment=1, num_worst_tokens=0, config=None, previous_event=None, "
    "async_finish=False, allocate_on_comm_stream=False",
    "combine": "x, handle, topk_weights=None, bias=None, config=None, previous_event=None, "
    "async_finish=False, allocate_on_comm_stream=False",
    "internode_dispatch": "x, handle=None, num_tokens_per_rank=None, "
    "num_tokens_per_rdma_rank=None, is_token_in_rank=None, num_tokens_per_expert=None, "
    "topk_idx=None, topk_weights=None, expert_alignment=1, config=None, previous_event=None, "
    "async_finish=False, allocate_on_comm_stream=False",
    "internode_combine": "x, handle, topk_weights=None, bias=None, config=None, "
    "previous_event=None, async_finish=False, allocate_on_comm_stream=False",
    "clean_low_latency_buffer": "num_max_dispatch_tokens_per_rank, hidden, num_experts",
    "low_latency_dispatch": "x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, "
    "cumulative_local_expert_recv_stats=None, dispatch_wait_recv_cost_stats=None, use_fp8=True, "
    "round_scale=False, use_ue8m0=False, async_finish=False, return_recv_hook=False",
    "low_latency_combine": "x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False, "
    "async_finish=False, return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None",
    "get_next_low_latency_combine_buffer": "handle",
    "low_latency_update_mask_buffer": "rank_to_mask, mask=False",
    "low_latency_query_mask_buffer": "mask_status",
    "low_latency_clean_mask_buffer": "",
    "destroy": "",
    "get_local_buffer_tensor": "dtype, size=None, offset=0, use_rdma_buffer=False",
    "get_comm_stream": "",
    "is_sm90_compiled": "",
    "capture": "",
    "set_num_sms": "new_num_sms",
    "get_dispatch_config": "num_ranks",
    "get_combine_config": "num_ranks",
    "get_low_latency_rdma_size_hint": "num_max_dispatch_tokens_per_rank, hidden, num_ranks, "
    "num_experts",
    "__init__": "group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, "
    "num_qps_per_rank=24, allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, "
    "explicitly_destroy=False, *, enable_shrink=False, comm=None, use_fabric=False, "
    "num_nvl_peers=8",
}
V2 = {
    "__init__": "group, num_bytes=None, num_cpu_bytes=0, num_max_tokens_per_rank=0, hidden=0, "
    "num_topk=0, use_fp8_dispatch=False, deterministic=False, allow_hybrid_mode=True, "
    "allow_multiple_reduction=True, prefer_overlap_with_compute=True, sl_idx=3, "
    "num_allocated_qps=0, num_cpu_timeout_secs=300, num_gpu_timeout_secs=100, "
    "explicitly_destroy=False",
    "get_buffer_size_hint": "group, num_max_tokens_per_rank, hidden, num_topk=0, "
    "use_fp8_dispatch=False, allow_hybrid_mode=True, allow_multiple_reduction=True",
    "capture": "",
    "destroy": "",
    "barrier": "use_comm_stream=True, with_cpu_sync=False, sequential=True",
    "get_comm_stream": "",
    "get_physical_domain_size": "",
    "get_logical_domain_size": "",
    "get_theoretical_num_sms": "num_experts, num_topk, num_scaleout_topk=0, rdma_gbs=0, "
    "nvlink_gbs=0, sm_read_gbs=200, sm_write_gbs=50",
    "get_theoretical_num_qps": "num_sms",
    "dispatch": "x, topk_idx=None, topk_weights=None, cumulative_local_expert_recv_stats=None, "
    "num_experts=None, num_max_tokens_per_rank=None, expert_alignment=None, num_sms=0, num_qps=0, "
    "previous_event=None, previous_event_before_epilogue=None, async_with_compute_stream=False, "
    "allocate_on_comm_stream=False, handle=None, do_handle_copy=True, do_cpu_sync=None, "
    "do_expand=False, do_zero_padding=False, use_tma_aligned_col_major_sf=False",
    "combine": "x, handle, topk_weights=None, bias=None, num_sms=0, num_qps=0, "
    "previous_event=None, previous_event_before_epilogue=None, async_with_compute_stream=False, "
    "allocate_on_comm_stream=False",
}
OTHERS = {
    "Config": "num_sms=20, num_max_nvl_chunked_send_tokens=6, "
    "num_max_nvl_chunked_recv_tokens=256, num_max_rdma_chunked_send_tokens=6, "
    "num_max_rdma_chunked_recv_tokens=256",
    "EventHandle": "",
    "EventOverlap": "event=None, extra_tensors=None",
    "get_physical_domain_size": "group",
    "get_logical_domain_size": "group, allow_hybrid_mode=True",
}


def written(signature: inspect.Signature) -> str:
    parts, keyword_only = [], False
    for p in signature.parameters.values():
        if p.name == "self":
            continue
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        parts.append(p.name + ("" if p.default is p.empty else f"={p.default!r}"))
    return ", ".join(parts)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("Buffer", n) for n in V1] + [("ElasticBuffer", n) for n in V2] + [("", n) for n in OTHERS],
)
def test_signature(kind: str, name: str) -> None:
    from epcomm.compat import deep_ep

    if not kind:
        assert written(inspect.signature(getattr(deep_ep, name))) == OTHERS[name]
        return
    expected = (V1 if kind == "Buffer" else V2)[name]
    assert written(inspect.signature(getattr(getattr(deep_ep, kind), name))) == expected


def test_statics_need_no_instance() -> None:
    from epcomm.compat.deep_ep import Buffer, ElasticBuffer, EventHandle, EventOverlap

    statics = {"is_sm90_compiled", "set_num_sms", "capture", "get_low_latency_rdma_size_hint"}
    for name in statics | {"get_dispatch_config", "get_combine_config"}:
        assert isinstance(inspect.getattr_static(Buffer, name), staticmethod), name
    for name in ("capture", "get_buffer_size_hint"):
        assert isinstance(inspect.getattr_static(ElasticBuffer, name), staticmethod), name
    assert Buffer.num_sms == 20
    Buffer.set_num_sms(32)
    assert Buffer.num_sms == 32 and Buffer.get_dispatch_config(4).num_sms == 32
    Buffer.set_num_sms(20)
    with pytest.raises(AssertionError, match="21"):
        Buffer.set_num_sms(21)
    assert Buffer.is_sm90_compiled() is True
    assert isinstance(Buffer.capture(), EventOverlap)
    assert isinstance(ElasticBuffer.capture(), EventHandle)


def test_golden_size_hints() -> None:
    from epcomm.compat.deep_ep import Buffer

    golden = {2: 83_927_552, 4: 167_854_976, 8: 335_709_824}
    for ranks, size in golden.items():
        for config in (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)):
            assert config.get_nvl_buffer_size_hint(14336, ranks) == size
            assert config.get_rdma_buffer_size_hint(14336, ranks) == 0
    hint = Buffer.get_low_latency_rdma_size_hint
    assert hint(128, 7168, 4, 256) == hint(128, 7168, 8, 256) == 1_908_410_496
    assert hint(128, 2048, 4, 16) == 34_079_104
    assert (
        hint(num_max_dispatch_tokens_per_rank=256, hidden=7168, num_ranks=4, num_experts=256)
        == 3_816_818_816
    )


def test_config_rules() -> None:
    from epcomm.compat.deep_ep import Buffer, Config

    fields = ("num_max_nvl_chunked_send_tokens", "num_max_nvl_chunked_recv_tokens")
    fields += ("num_max_rdma_chunked_send_tokens", "num_max_rdma_chunked_recv_tokens")

    def values(config: Config) -> tuple[int, ...]:
        return tuple(getattr(config, name) for name in fields)

    dispatch = {2: (24, 256, 6, 128), 4: (6, 256, 6, 128), 8: (6, 256, 6, 128)}
    dispatch[16] = (36, 288, 20, 128)
    combine = {2: (10, 256, 6, 128), 4: (9, 256, 6, 128), 8: (4, 256, 6, 128)}
    combine[16] = (4, 288, 12, 128)
    for ranks in dispatch:
        for table, get in (
            (dispatch, Buffer.get_dispatch_config),
            (combine, Buffer.get_combine_config),
        ):
            send, recv = table[ranks][2:]
            expected = (*table[ranks][:3], -(-recv // send) * send)
            assert values(get(ranks)) == expected
    for ranks in (16, 24, 32, 48, 64, 96, 128, 144, 160):
        assert Buffer.get_dispatch_config(ranks).get_rdma_buffer_size_hint(14336, ranks) > 0
        assert Buffer.get_combine_config(ranks).get_nvl_buffer_size_hint(14336, ranks) > 0
    with pytest.raises(AssertionError, match="3"):
        Buffer.get_dispatch_config(3)
    assert Config(**dict.fromkeys(["num_sms"], 24)).num_sms == 24
    for wrong in ((20, 256, 256), (20, 6, 256, 6, 6), (20, 6, 256, 100, 90), (20, 0), (-1,)):
        with pytest.raises(RuntimeError):
            Config(*wrong)


def test_events_without_a_gpu() -> None:
    import torch

    from epcomm.compat.deep_ep import EventHandle, EventOverlap

    told = []
    event = EventOverlap(EventHandle(), (torch.zeros(1),))
    event.register_hook_after_wait(lambda: told.append("waited"))
    with event(release_handle=True) as inside:
        assert inside is event and told == []
    assert told == ["waited"] and event.event is None and event.extra_tensors is None
    with EventOverlap() as none:
        none.register_hook_after_wait(lambda: told.append("never"))
    assert told == ["waited"] and none.event is None


def test_import_fails_with_import_error_only() -> None:
    ok("import epcomm.compat.deep_ep, epcomm.compat.deep_ep_cpp")
    # Without torch: what engines catch.
    code = """
        import sys
        sys.modules["torch"] = None
        try:
            import epcomm.compat.deep_ep
        except ImportError as error:
            print(type(error).__name__ in ("ImportError", "ModuleNotFoundError"))
    """
    assert ok(code) == ["True"]


SURFACE = """
    import importlib.util
    import deep_ep
    from deep_ep import Buffer, Config, ElasticBuffer, EPHandle, EventHandle, EventOverlap
    from deep_ep import __version__, topk_idx_t
    from deep_ep.buffer import Buffer as b0
    from deep_ep.buffers.elastic import ElasticBuffer as e1, EPHandle as h1
    from deep_ep.buffers.legacy import Buffer as b1
    from deep_ep.utils import EventHandle as h2, EventOverlap as o2, check_nvlink_connections
    from deep_ep.utils.event import EventHandle as h3, EventOverlap as o3
    from deep_ep import get_logical_domain_size, get_physical_domain_size
    from deep_ep.utils.envs import get_logical_domain_size as l5, get_physical_domain_size as p5
    from deep_ep_cpp import Config as c4, EventHandle as h4, get_low_latency_rdma_size_hint
    from deep_ep_cpp import is_sm90_compiled, topk_idx_t as t4
    import deep_ep.utils.event, torch
    import epcomm.compat.deep_ep as ours
    assert Buffer is b0 and Buffer is b1
    assert Buffer is ours.Buffer and ElasticBuffer is e1 and EPHandle is h1
    assert EventHandle is h2 and EventHandle is h3 and EventHandle is h4
    assert EventOverlap is o2 and EventOverlap is o3 and Config is c4
    assert topk_idx_t is t4 and t4 is torch.int64
    assert get_logical_domain_size is l5 and get_physical_domain_size is p5
    assert __version__.startswith("2.1.0")
    assert importlib.util.find_spec("deep_ep") is not None
    assert importlib.util.find_spec("deep_ep_cpp") is not None
    assert not hasattr(deep_ep, "HybridEPBuffer")
    assert Buffer.num_sms == 20 and is_sm90_compiled()
    torch.library.Library("deepep", "DEF"), torch.library.Library("hybridep", "DEF")
    print("fine")
"""


def test_install_makes_an_alias() -> None:
    code = "import epcomm.compat\nepcomm.compat.install(); epcomm.compat.install()\n"
    assert ok(code + textwrap.dedent(SURFACE)) == ["fine"]


def test_install_refuses_another_deep_ep() -> None:
    code = """
        import sys, types
        sys.modules["deep_ep"] = types.ModuleType("deep_ep")
        import epcomm.compat
        try:
            epcomm.compat.install()
        except ImportError as error:
            print("deep_ep was imported already" in str(error))
        print("deep_ep.utils" in sys.modules)
    """
    assert ok(code) == ["True", "False"]


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
@pytest.mark.parametrize("switch", ["", "0", "1"])
def test_plugins_are_off_unless_asked(group: str, switch: str) -> None:
    (entry,) = (e for e in entry_points(group=group) if e.name == "epcomm")
    code = f"""
        import importlib.util, sys
        from {entry.module} import {entry.attr} as plugin
        assert "torch" not in sys.modules
        plugin(); plugin()
        print("torch" in sys.modules, importlib.util.find_spec("deep_ep") is not None)
    """
    on = str(switch == "1")
    assert ok(code, EPCOMM_DEEP_EP=switch) == [on, on]


def test_the_switch_is_checked() -> None:
    done = run_python("from epcomm.compat.plugins import vllm; vllm()", EPCOMM_DEEP_EP="yes")
    assert done.returncode != 0 and "EPCOMM_DEEP_EP is 'yes'; expected 0 or 1" in done.stderr


def test_sglang_modules_that_looked_too_early_are_told() -> None:
    code = """
        import sys, types
        name = "sglang.srt.layers.moe.token_dispatcher.deepep"
        early, found = types.ModuleType(name), types.ModuleType(name + "_v2")
        early.use_deepep = False
        found.use_deepep_v2, found.ElasticBuffer = True, "theirs"
        sys.modules.update({name: early, name + "_v2": found})
        from epcomm.compat.plugins import sglang
        sglang()
        from deep_ep import Buffer, Config
        print(early.use_deepep, early.Buffer is Buffer, early.Config is Config, found.ElasticBuffer)
    """
    assert ok(code, EPCOMM_DEEP_EP="1") == ["True", "True", "True", "theirs"]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution, built and installed in a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "deep_ep"
    import shutil

    shutil.copytree(SHIM, source, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--no-index"]
    done = subprocess.run(
        [*command, "--target", str(target), str(source)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_the_shim_is_a_real_package(shim: Path) -> None:
    found = "import importlib.util\nassert importlib.util.find_spec('deep_ep').origin\n"
    assert ok(found + textwrap.dedent(SURFACE), PYTHONPATH=str(shim)) == ["fine"]
    version = "from importlib.metadata import version; print(version('epcomm-deep-ep'))"
    import epcomm

    assert ok(version, PYTHONPATH=str(shim)) == [epcomm.__version__]
    # Both ways in at once are one.
    both = (
        "import deep_ep, deep_ep_cpp, epcomm.compat as c; c.install(); from deep_ep import Buffer"
    )
    assert ok(both + "; print(Buffer.__module__)", PYTHONPATH=str(shim))


def _refused(path: str) -> str:
    code = """
        for name in ("deep_ep", "deep_ep_cpp"):
            try:
                __import__(name)
            except ImportError as error:
                text = str(error)
        print(text)
    """
    return " ".join(ok(code, PYTHONPATH=path))


def test_the_shim_refuses_beside_another(shim: Path, tmp_path: Path) -> None:
    import shutil

    # A package of that name elsewhere on the path.
    other = tmp_path / "other"
    (other / "deep_ep").mkdir(parents=True)
    (other / "deep_ep" / "__init__.py").write_text("")
    text = _refused(f"{shim}:{other}")
    assert "must be the only deep_ep" in text and str(other) in text and "uninstall" in text
    # One that was installed before into the same folder.
    mixed = tmp_path / "mixed"
    shutil.copytree(shim, mixed)
    (mixed / "deep_ep" / "hybrid_ep_buffer.py").write_text("")
    assert "hybrid_ep_buffer.py" in _refused(str(mixed))
    (mixed / "deep_ep" / "hybrid_ep_buffer.py").unlink()
    (mixed / "deep_ep_cpp.cpython-311-x86_64-linux-gnu.so").write_text("")
    assert "deep_ep_cpp.cpython" in _refused(str(mixed))
    # One that is known by its metadata alone.
    meta = tmp_path / "meta" / "deep_ep-2.1.0.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: deep_ep\nVersion: 2.1.0\n")
    assert "distribution deep-ep 2.1.0" in _refused(f"{shim}:{meta.parent}")
