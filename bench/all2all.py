"""Dispatch and combine of MoE tokens: how fast, next to the raw link and to other libraries.

    torchrun --nproc-per-node 4 bench/all2all.py

What each column means is written in docs/benchmarking.md. Exits with 1 if any element was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

import output
import overlap
from adapters import ADAPTERS, Adapter, Operation, Options, Unavailable
from adapters.epcomm_adapter import EpcommAdapter
from arguments import parse_args
from plot import write_plot
from rawlink import RawLink
from timing import SEPARATE, Stopwatch, Times
from workload import CaseConfig, Workload

BUDGET_S = {"cpu": 0.2, "cuda": 0.5}  # time of one measurement, where --iters does not say
FLOOR_TOKENS = {"cpu": 512, "cuda": 4096}  # a raw link that moves so many runs at its best


@dataclasses.dataclass(frozen=True)
class Machine:
    """This rank's place, and what is written into every row."""

    rank: int
    ranks: int
    device: torch.device
    device_name: str
    driver: str | None
    commit: str


@contextlib.contextmanager
def process_group(transports: Sequence[str]) -> Iterator[torch.device]:
    """The device of this rank. Makes a process group unless there is one already."""
    use_cuda = "cpu" not in transports and torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")
    if dist.is_initialized():
        yield device
        return
    if "RANK" not in os.environ:
        sys.exit("bench: start me with torchrun --nproc-per-node N bench/all2all.py")
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


class Bench:
    """Runs every case and collects the rows. Everything but the printing is collective."""

    def __init__(self, args: argparse.Namespace, machine: Machine):
        self.args = args
        self.machine = machine
        self.rows: list[output.Row] = []
        self._stopwatch = Stopwatch(
            machine.device, args.warmup, args.iters, BUDGET_S[machine.device.type]
        )
        self._progress = output.Progress() if machine.rank == 0 else None
        self._noted: set[str] = set()
        self._raw_us: dict[str, float] = {}  # of the case at hand, by operation
        self._best_gbps = 0.0  # of the raw link

    def run(self) -> None:
        self._best_gbps = self._best_raw_link()
        self._print(self._title())
        self._print(output.header())
        for tokens in self.args.tokens:
            workload = self._workload(tokens)
            self._measure_all("raw", RawLink(workload), workload, (SEPARATE,))
            for transport in self.args.transport:
                for name in self.args.adapter:
                    # What another library does is the same beside each transport.
                    if ADAPTERS[name].takes_transport or transport == self.args.transport[0]:
                        self._run_adapter(name, workload, transport)

    def _best_raw_link(self) -> float:
        """GB/s of the raw link with many bytes: what the byte floor of every row is made with."""
        self._show("raw link, at its best")
        workload = self._workload(FLOOR_TOKENS[self.machine.device.type])
        link, best = RawLink(workload), 0.0
        for operation in link.operations():
            times, _ = self._stopwatch.measure(operation.call, SEPARATE)
            best = max(best, workload.link_bytes(operation.operation) * 1e-3 / times.p50_us)
        link.close()
        return best

    def _workload(self, tokens: int) -> Workload:
        args, machine = self.args, self.machine
        routing = args.routing.make(machine.ranks, tokens, args.experts, args.topk, args.seed)
        config = CaseConfig(
            rank=machine.rank,
            hidden=args.hidden,
            dtype=args.dtype,
            quant=args.quant,
            layout=args.layout,
            expert_alignment=args.expert_alignment,
            device=machine.device,
            seed=args.seed,
        )
        return Workload(config, routing)

    def _options(self, transport: str, num_sms: int | None) -> Options:
        args = self.args
        chosen = dict(option.split("=", 1) for option in args.transport_option)
        return Options(
            transport=transport,
            ranks_per_node=args.ranks_per_node if transport == "hierarchical" else None,
            num_sms=num_sms,
            launches=tuple(args.launch),
            timeout=args.timeout,
            transport_options=chosen,
            like_deep_ep=args.like_deep_ep,
        )

    def _run_adapter(self, name: str, workload: Workload, transport: str) -> None:
        adapter_class = ADAPTERS[name]
        sweep = self.args.num_sms if adapter_class.takes_num_sms else None
        for num_sms in sweep or [None]:
            self._show(f"{name}, setting up, {workload.tokens} tokens")
            try:
                adapter = adapter_class(workload, self._options(transport, num_sms))
            except Unavailable as reason:
                self._note(f"# {name} is left out: {reason}")
                return
            if adapter.left_out:
                self._note(f"# left out of {name}: {adapter.left_out}")
            if self.args.overlap and isinstance(adapter, EpcommAdapter):
                self._measure_overlap(name, adapter, workload)
            self._measure_all(name, adapter, workload, self.args.cadence)

    def _measure_all(
        self, name: str, adapter: Adapter, workload: Workload, cadences: Sequence[str]
    ) -> None:
        for operation in adapter.operations():
            if self._wanted(name, operation):
                for cadence in cadences:
                    self._measure(name, adapter, workload, operation, cadence)
            del operation  # and what it holds, before the next is made
        adapter.close()

    def _wanted(self, name: str, operation: Operation) -> bool:
        """What everything is compared with is always timed."""
        args = self.args
        chosen = operation.operation in args.operations and operation.routing_mode in args.modes
        return name == "raw" or chosen

    def _measure(
        self, name: str, adapter: Adapter, workload: Workload, operation: Operation, cadence: str
    ) -> None:
        mode = f"{operation.routing_mode}/{cadence}"
        self._show(f"{name}, {operation.operation} {mode}, {workload.tokens} tokens")
        # Checked before the first time is taken, and again on what the last timed call returned.
        wrong = operation.wrong(operation.call())
        times, result = self._stopwatch.measure(operation.call, cadence)
        wrong += operation.wrong(result)
        if name == "raw":
            self._raw_us[operation.operation] = times.p50_us
            self._raw_us["pair"] = sum(
                self._raw_us[each] for each in self._raw_us if each != "pair"
            )
        row = self._row(name, adapter, workload, operation.operation, times)
        self._add(dataclasses.replace(row, mode=mode), wrong)
        if name == "compat" and self.args.like_deep_ep:
            self._print_beside(self.rows[-1])
        if name == "epcomm":
            self._print_ratios(self.rows[-1])

    def _print_beside(self, shim: output.Row) -> None:
        """What a call costs more than epcomm's own that does the same work."""
        native = {
            row.mode: row
            for row in self.rows
            if (row.adapter, row.operation, row.tokens) == ("epcomm", shim.operation, shim.tokens)
            and shim.transport in ("auto", row.transport.partition(":")[0])
        }
        # On the CPU there is no no-sync: nothing is waited for anyway.
        for mode in (shim.mode, shim.mode.replace("no-sync", "fresh")):
            if mode in native:
                self._print(output.beside_line(shim, native[mode]))
                break

    def _print_ratios(self, row: output.Row) -> None:
        """What earlier transports took for the same, as multiples of it."""
        same = ("adapter", "operation", "mode", "tokens", "sms")
        for other in self.rows[:-1]:
            if all(getattr(other, field) == getattr(row, field) for field in same):
                self._print(output.ratio_line(other, row))

    def _measure_overlap(self, name: str, adapter: EpcommAdapter, workload: Workload) -> None:
        gemm = overlap.GroupedGemm(workload, self.args.overlap_width)
        self._note(f"# grouped GEMM: {gemm.shape}")
        for operation, start, check in adapter.overlapped():
            self._show(f"{name}, {operation} beside a GEMM, {workload.tokens} tokens")
            measured, wrong = overlap.measure(self._stopwatch, gemm, start, check, adapter.num_sms)
            row = self._row(name, adapter, workload, operation, measured.together)
            row = dataclasses.replace(
                row,
                mode=f"overlap/{SEPARATE}",
                alone_us=round(measured.alone_us, 2),
                gemm_us=round(measured.gemm_us, 2),
            )
            self._add(row, wrong)
            self._print(output.overlap_line(row))

    def _add(self, row: output.Row, wrong: int) -> None:
        """Prints and keeps a row, with the wrong elements of all ranks."""
        wrong_everywhere = torch.tensor([wrong])
        dist.all_reduce(wrong_everywhere)
        row = dataclasses.replace(row, wrong=int(wrong_everywhere.item()))
        self.rows.append(row)
        if self.args.json and self.machine.rank == 0:
            output.append_json(row, self.args.json)  # at once: a run may be cut short
        self._print(output.line(row))

    def _row(
        self, name: str, adapter: Adapter, workload: Workload, operation: str, times: Times
    ) -> output.Row:
        is_combine = operation == "combine"
        gbps = 1e-3 / times.p50_us
        link_bytes = workload.link_bytes(operation)
        return output.Row(
            schema_version=output.SCHEMA_VERSION,
            adapter=name,
            transport=adapter.transport,
            operation=operation,
            mode="",
            tokens=workload.tokens,
            hidden=self.args.hidden,
            topk=self.args.topk,
            experts=self.args.experts,
            ranks=self.machine.ranks,
            ranks_per_node=adapter.ranks_per_node,
            dtype=workload.combine_dtype_name if is_combine else self.args.dtype,
            quant=None if is_combine else self.args.quant,
            layout=adapter.layout,
            like_deep_ep=self.args.like_deep_ep and name == "epcomm",
            sms=adapter.num_sms,
            routing=workload.routing.name,
            bytes=round(link_bytes),
            iterations=times.iterations,
            p50_us=round(times.p50_us, 2),
            p99_us=round(times.p99_us, 2),
            link_gbps=round(link_bytes * gbps, 4),
            logical_gbps=round(workload.logical_bytes(operation) * gbps, 4),
            raw_gbps=round(link_bytes * 1e-3 / self._raw_us[operation], 4),
            floor_us=round(link_bytes * 1e-3 / self._best_gbps, 2) if self._best_gbps else 0.0,
            alone_us=None,
            gemm_us=None,
            wrong=0,
            device=self.machine.device_name,
            driver=self.machine.driver,
            torch=torch.__version__,
            commit=self.machine.commit,
        )

    def _title(self) -> str:
        args = self.args
        to_quant = f" quantised to {args.quant}" if args.quant else ""
        return (
            f"# {self.machine.ranks} ranks, hidden {args.hidden}, "
            f"top-{args.topk} of {args.experts} experts, {args.routing.name} routing, "
            f"{args.dtype}{to_quant}, {args.layout} layout, "
            f"raw link at best {self._best_gbps:.1f} GB/s, "
            f"{self.machine.device_name}, commit {self.machine.commit}"
        )

    def _show(self, text: str) -> None:
        if self._progress:
            self._progress.show(text)

    def _note(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._print(text)

    def _print(self, text: str) -> None:
        if self._progress:
            self._progress.clear()
            print(text, flush=True)


def run(args: argparse.Namespace) -> list[output.Row]:
    """Runs the benchmark in this rank; writes what args asks for. Collective."""
    with process_group(args.transport) as device:
        if args.tokens is None:
            args.tokens = [1, 8, 64, 512] + [4096] * (device.type == "cuda")
        if device.type == "cpu" and "graph" in args.launch:
            sys.exit("bench: --launch graph needs GPUs")
        machine = Machine(
            rank=dist.get_rank(),
            ranks=dist.get_world_size(),
            device=device,
            device_name=output.device_name(device),
            driver=output.driver_version(device),
            commit=args.commit or output.commit(),
        )
        if args.json and machine.rank == 0:
            pathlib.Path(args.json).write_text("", encoding="utf-8")
        bench = Bench(args, machine)
        bench.run()
        if machine.rank == 0 and args.csv:
            output.write_csv(bench.rows, args.csv)
        if machine.rank == 0 and args.plot:
            write_plot([dataclasses.asdict(row) for row in bench.rows], args.plot)
        return bench.rows


def main(argv: Sequence[str] | None = None) -> int:
    rows = run(parse_args(argv))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
