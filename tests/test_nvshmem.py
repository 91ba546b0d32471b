"""How NVSHMEM's host library is found and checked. Needs neither NVSHMEM nor a GPU."""

import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from epcomm import _core, config, native, nvshmem

PATH = "/somewhere/libnvshmem_host.so.3"


@pytest.mark.parametrize("host", [(3, 4, 5), (3, 4, 6), (3, 5, 19), (3, 8, 0), (3, 8, 99)])
def test_versions_that_are_taken(host: nvshmem.Version) -> None:
    nvshmem.check_version(host, PATH)
    nvshmem.check_version(host, PATH, host)
    if host[1] == 4:
        nvshmem.check_version(host, PATH, (3, 4, 5))


@pytest.mark.parametrize("host", [(2, 11, 0), (3, 3, 24), (3, 4, 4), (3, 9, 0), (4, 0, 0)])
def test_versions_that_are_refused(host: nvshmem.Version) -> None:
    text = ".".join(map(str, host))
    with pytest.raises(ValueError, match=rf"{PATH} is NVSHMEM {text}; expected 3\.4\.5 .* 3\.9\.0"):
        nvshmem.check_version(host, PATH, host)


@pytest.mark.parametrize(
    ("host", "device"),
    [((3, 8, 0), (3, 4, 5)), ((3, 4, 5), (3, 8, 0)), ((3, 4, 5), (3, 4, 6))],
)
def test_versions_that_do_not_go_together(host: nvshmem.Version, device: nvshmem.Version) -> None:
    built = ".".join(map(str, device))
    with pytest.raises(ValueError, match=rf"built with the device library {built}; expected that"):
        nvshmem.check_version(host, PATH, device)


def test_multicast_is_the_callers_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVSHMEM_DISABLE_NVLS", raising=False)
    with pytest.raises(ValueError, match="NVSHMEM_DISABLE_NVLS is not set: set it to 1"):
        nvshmem.check_multicast()
    for value in ("1", "0"):
        monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", value)
        nvshmem.check_multicast()


def test_library_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / nvshmem.SONAME
    monkeypatch.setenv("EPCOMM_NVSHMEM_LIB", str(tmp_path))
    with pytest.raises(ValueError, match=rf"EPCOMM_NVSHMEM_LIB is .*there is no file {library}"):
        nvshmem.find_library()
    library.touch()
    assert nvshmem.find_library() == library
    monkeypatch.setenv("EPCOMM_NVSHMEM_LIB", str(library))
    assert nvshmem.find_library() == library


def test_library_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """nvidia.nvshmem is a namespace package: a folder without __init__.py."""
    monkeypatch.delenv("EPCOMM_NVSHMEM_LIB", raising=False)
    library = tmp_path / "nvidia" / "nvshmem" / "lib" / nvshmem.SONAME
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.delitem(sys.modules, "nvidia.nvshmem", raising=False)
    assert nvshmem.find_library() == library
    library.unlink()
    monkeypatch.setattr(nvshmem, "_package_folders", lambda: [str(library.parents[1])])
    assert nvshmem.find_library() is None


FAKE = "void nvshmemx_vendor_get_version_info(int* a, int* b, int* c) { *a = 3; *b = 2; *c = 1; }"


def test_open_library(tmp_path: Path) -> None:
    """In processes of their own, for a library stays loaded."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "fake.c").write_text(FAKE)
    library = tmp_path / nvshmem.SONAME
    soname = f"-Wl,-soname,{nvshmem.SONAME}"
    command = [compiler, "-shared", "-fPIC", soname, "-o", str(library), str(tmp_path / "fake.c")]
    subprocess.run(command, check=True)
    code = f"""if True:
        import os
        os.environ["EPCOMM_NVSHMEM_LIB"] = {str(library)!r}
        before = dict(os.environ)
        from epcomm import nvshmem
        for _ in range(2):
            opened, path = nvshmem.open_library()
            version = nvshmem.version_of(opened)
            print(version, path)
        assert dict(os.environ) == before
        try:
            nvshmem.check_version(version, path)
        except ValueError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert lines[0] == f"(3, 2, 1) {library}", done.stderr
    assert lines[1] == f"(3, 2, 1) {nvshmem.SONAME} (loaded already)"
    assert "is NVSHMEM 3.2.1; expected 3.4.5" in lines[2]


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / nvshmem.SONAME).write_text("nothing")
    monkeypatch.setenv("EPCOMM_NVSHMEM_LIB", str(tmp_path))
    with pytest.raises(ValueError, match="cannot be opened"):
        nvshmem.open_library()


def test_a_build_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "nvshmem_status", "not built: no CUDA")
    assert nvshmem.built_transports() == []
    with pytest.raises(ValueError, match="no transport over NVSHMEM: not built: no CUDA"):
        nvshmem.load()
    with pytest.raises(ValueError, match=r"'rdma'; this build has: cpu.*_nvshmem: not built"):
        native.module_of("rdma")
    assert config.show_config()["nvshmem"] == "not built: no CUDA"


def test_a_build_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is checked before the extension module is imported."""
    monkeypatch.setattr(
        _core, "nvshmem_status", "built: transports hierarchical, rdma, device library 3.4.5"
    )
    monkeypatch.setenv("EPCOMM_NVSHMEM_LIB", str(tmp_path / "none"))
    assert nvshmem.device_library() == (3, 4, 5)
    shown = config.show_config()
    assert "rdma" in shown["transports"] and "there is no file" in shown["nvshmem"]

    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "1")
    monkeypatch.setattr(nvshmem, "open_library", lambda: (None, PATH))
    monkeypatch.setattr(nvshmem, "version_of", lambda library: (3, 7, 2))
    with pytest.raises(ValueError, match=r"NVSHMEM 3\.7\.2, and this epcomm was built .*3\.4\.5"):
        nvshmem.load()
    monkeypatch.setattr(nvshmem, "version_of", lambda library: (3, 4, 5))
    module = types.ModuleType("epcomm._nvshmem")
    monkeypatch.setitem(sys.modules, "epcomm._nvshmem", module)
    assert nvshmem.load() is module
    monkeypatch.delenv("NVSHMEM_DISABLE_NVLS")
    with pytest.raises(ValueError, match="NVSHMEM_DISABLE_NVLS"):
        nvshmem.load()
