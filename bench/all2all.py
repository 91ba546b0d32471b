"""Dispatch and combine of MoE tokens: how fast, next to the raw link and to other libraries.

    torchrun --nproc-per-node 4 bench/all2all.py

What each column means is written in docs/benchmarking.md. Exits with 1 if any element was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

import output
from adapters import ADAPTERS, Adapter, Operation, Options, Unavailable
from rawlink import RawLink
from routing import RoutingSpec
from timing import CADENCES, SEPARATE, Stopwatch
from workload import DTYPES, CaseConfig, Workload

BUDGET_S = {"cpu": 0.2, "cuda": 0.5}  # time of one measurement, where --iters does not say


def integers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of at least 1")
    return values


def adapter_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ADAPTERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ADAPTERS)}")
    return names


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Times MoE dispatch and combine. Start it with torchrun, one process per rank."
    )
    add = parser.add_argument
    add("--transport", default=os.environ.get("EPCOMM_TRANSPORT", "auto"), help="of epcomm")
    add("--tokens", type=integers, help="per rank: 1,8,64,512 (and 4096 on a GPU)")
    add("--hidden", type=int, default=7168, help="elements of a token row")
    add("--topk", type=int, help="experts per token: 8, or what the routing file has")
    add("--experts", type=int, default=256)
    add(
        "--dtype",
        choices=DTYPES,
        default="bf16",
        help="fp8 takes (q, scales) pairs; combine is bf16",
    )
    add("--layout", choices=("token", "expert", "padded"), default="token")
    add("--expert-alignment", type=int, default=1, help="rows, for --layout expert")
    add("--num-sms", type=integers, help="most SMs a call may use; several values are a sweep")
    add("--routing", default="uniform", help="uniform, zipf:S, one-expert, or a file of expert ids")
    add("--adapter", type=adapter_names, default=["epcomm", "torch"], help=",".join(ADAPTERS))
    add("--graph", action="store_true", help="host_sync=False, captured into CUDA graphs")
    add(
        "--transport-option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="of epcomm's transport_options; may be repeated",
    )
    add("--commit", help="what the rows are of; default: asks git")
    add("--json", metavar="FILE", help="write the rows as JSON lines")
    add("--csv", metavar="FILE", help="write the rows as CSV")
    add("--plot", metavar="FILE.png", help="draw time and bandwidth; needs matplotlib")
    add("--iters", type=int, default=0, help="timed iterations; 0: as many as fit the time budget")
    add("--warmup", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=30.0, help="seconds that a wait for a peer may take")
    args = parser.parse_args(argv)
    args.routing = _or_usage_error(parser, lambda: RoutingSpec.parse(args.routing))
    if args.topk is None:
        args.topk = 8 if args.routing.table is None else args.routing.table.shape[1]
    if not 1 <= args.topk <= args.experts:
        parser.error(f"--topk {args.topk}: expected 1 to {args.experts} (--experts)")
    if args.plot:
        _or_usage_error(parser, lambda: __import__("matplotlib"))
    return args


def _or_usage_error(parser: argparse.ArgumentParser, make):
    try:
        return make()
    except (ValueError, ImportError) as error:
        parser.error(str(error))


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
def process_group(transport: str) -> Iterator[torch.device]:
    """The device of this rank. Makes a process group unless there is one already."""
    use_cuda = transport != "cpu" and torch.cuda.is_available()
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

    def run(self) -> None:
        self._print(self._title())
        self._print(output.header())
        for tokens in self.args.tokens:
            workload = self._workload(tokens)
            self._measure_all("raw", RawLink(workload, self._options(None)), workload, (SEPARATE,))
            for name in self.args.adapter:
                self._run_adapter(name, workload)

    def _workload(self, tokens: int) -> Workload:
        args, machine = self.args, self.machine
        routing = args.routing.make(machine.ranks, tokens, args.experts, args.topk, args.seed)
        config = CaseConfig(
            rank=machine.rank,
            hidden=args.hidden,
            dtype=args.dtype,
            layout=args.layout,
            expert_alignment=args.expert_alignment,
            device=machine.device,
            seed=args.seed,
        )
        return Workload(config, routing)

    def _options(self, num_sms: int | None) -> Options:
        args = self.args
        chosen = dict(option.split("=", 1) for option in args.transport_option)
        return Options(args.transport, num_sms, args.graph, args.timeout, chosen)

    def _run_adapter(self, name: str, workload: Workload) -> None:
        adapter_class = ADAPTERS[name]
        sweep = self.args.num_sms if adapter_class.takes_num_sms else None
        for num_sms in sweep or [None]:
            self._show(f"{name}, setting up, {workload.tokens} tokens")
            try:
                adapter = adapter_class(workload, self._options(num_sms))
            except Unavailable as reason:
                self._note(f"# {name} is left out: {reason}")
                return
            self._measure_all(name, adapter, workload, CADENCES)

    def _measure_all(
        self, name: str, adapter: Adapter, workload: Workload, cadences: Sequence[str]
    ) -> None:
        for operation in adapter.operations():
            for cadence in cadences:
                self._measure(name, adapter, workload, operation, cadence)
        adapter.close()

    def _measure(
        self, name: str, adapter: Adapter, workload: Workload, operation: Operation, cadence: str
    ) -> None:
        mode = f"{operation.routing_mode}/{cadence}"
        self._show(f"{name}, {operation.operation} {mode}, {workload.tokens} tokens")
        # Checked before the first time is taken, and again on what the last timed call returned.
        wrong = operation.wrong(operation.call())
        times, result = self._stopwatch.measure(operation.call, cadence)
        wrong += operation.wrong(result)
        wrong_everywhere = torch.tensor([wrong])
        dist.all_reduce(wrong_everywhere)
        if name == "raw":
            self._raw_us[operation.operation] = times.p50_us
            self._raw_us["pair"] = sum(
                self._raw_us[each] for each in self._raw_us if each != "pair"
            )
        is_combine = operation.operation == "combine"
        gbps = 1e-3 / times.p50_us
        link_bytes = workload.link_bytes(operation.operation)
        row = output.Row(
            schema_version=output.SCHEMA_VERSION,
            adapter=name,
            transport=adapter.transport,
            operation=operation.operation,
            mode=mode,
            tokens=workload.tokens,
            hidden=self.args.hidden,
            topk=self.args.topk,
            experts=self.args.experts,
            ranks=self.machine.ranks,
            dtype=workload.combine_dtype_name if is_combine else self.args.dtype,
            layout=adapter.layout,
            sms=adapter.num_sms,
            routing=workload.routing.name,
            bytes=round(link_bytes),
            iterations=times.iterations,
            p50_us=round(times.p50_us, 2),
            p99_us=round(times.p99_us, 2),
            link_gbps=round(link_bytes * gbps, 4),
            logical_gbps=round(workload.logical_bytes(operation.operation) * gbps, 4),
            raw_gbps=round(link_bytes * 1e-3 / self._raw_us[operation.operation], 4),
            wrong=int(wrong_everywhere.item()),
            device=self.machine.device_name,
            driver=self.machine.driver,
            torch=torch.__version__,
            commit=self.machine.commit,
        )
        self.rows.append(row)
        self._print(output.line(row))

    def _title(self) -> str:
        args = self.args
        return (
            f"# {self.machine.ranks} ranks, hidden {args.hidden}, "
            f"top-{args.topk} of {args.experts} experts, {args.routing.name} routing, "
            f"{args.dtype}, {args.layout} layout, "
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
        machine = Machine(
            rank=dist.get_rank(),
            ranks=dist.get_world_size(),
            device=device,
            device_name=output.device_name(device),
            driver=output.driver_version(device),
            commit=args.commit or output.commit(),
        )
        bench = Bench(args, machine)
        bench.run()
        if machine.rank == 0:
            for path, write in (
                (args.json, output.write_json),
                (args.csv, output.write_csv),
                (args.plot, output.write_plot),
            ):
                if path:
                    write(bench.rows, path)
        return bench.rows


def main(argv: Sequence[str] | None = None) -> int:
    rows = run(parse_args(argv))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
