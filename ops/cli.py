"""The command `millrace`."""

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from ops.environment import Environment
from ops.layout import Layout, Ports, binaries_folder
from ops.record import Record

PASSED_ON = {
    "submit": "submit a job: `ray job submit` with the same arguments, on the stack of this home",
    "simulate": "send real or generated events to Kafka (see `millrace simulate --help`)",
    "demo": "run the whole way of the data once (see `millrace demo --help`)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 1 for "no", 2 for an error that is told in one sentence."""
    _silence_warnings()
    words = list(sys.argv[1:] if argv is None else argv)
    environment = Environment.read()
    try:
        if words and words[0] in PASSED_ON:
            return _pass_on(words[0], words[1:], environment)
        arguments = _parser().parse_args(words)
        command: Callable[[argparse.Namespace, Environment], int] = arguments.command
        return command(arguments, environment)
    except (ValueError, FileNotFoundError) as error:
        if not _is_told(error):
            raise
        print(f"millrace: {error}", file=sys.stderr, flush=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="millrace",
        description="The local stack: broker, Ray, MLflow, features, served models and the stream worker.",
        epilog="Its state is under MILLRACE_HOME (default .millrace).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start what does not run yet")
    up.set_defaults(command=_up)
    for port in fields(Ports):
        up.add_argument(f"--{port.name}-port", type=_port, metavar="N", help=f"default {port.default}")
    for name, command, text in (
        ("down", _down, "end what `up` started, and nothing else"),
        ("status", _status, "show each part with its state, pid, address and log"),
        ("env", _env, 'print what a shell needs: eval "$(millrace env)"'),
        ("doctor", _doctor, "say what is missing on this machine and how to get it"),
    ):
        commands.add_parser(name, help=text).set_defaults(command=command)
    for name, text in PASSED_ON.items():
        commands.add_parser(name, help=text)
    return parser


def _port(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if not 1024 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 1024 to 65535, not {text!r}")
    return number


def _up(arguments: argparse.Namespace, environment: Environment) -> int:
    from ops.stack import ended_by_signals, open_stack

    chosen = {port.name: number for port in fields(Ports) if (number := getattr(arguments, f"{port.name}_port"))}
    with Record.read(environment.home).exclusively(), ended_by_signals():
        open_stack(environment, Ports(**chosen) if chosen else None, _say).up()
    return 0


def _down(_: argparse.Namespace, environment: Environment) -> int:
    from ops.stack import ended_by_signals, open_stack

    if not (record := Record.read(environment.home)).path.is_file():
        _say(f"nothing was ever started in {environment.home}")
        return 0
    with record.exclusively(), ended_by_signals():
        stack = open_stack(environment, say=_say)
        if not stack.record.parts:
            _say(f"nothing is up in {environment.home}")
        stack.down()
    return 0


def _status(_: argparse.Namespace, environment: Environment) -> int:
    from rich.console import Console
    from rich.table import Table

    from ops.stack import open_stack

    stack = open_stack(environment)
    rows = stack.status()
    table = Table("part", "state", "pid", "address", "log", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row.name, row.state, str(row.pid or "-"), row.address, str(row.log or "-"))
    console = Console(width=None if sys.stdout.isatty() else 300, soft_wrap=True)
    console.print(table)
    if lags := lag_lines(stack.layout.stream):
        console.print("\n" + "\n".join(lags), highlight=False)
    return int(any(row.state not in ("up", "external") for row in rows))


def _env(_: argparse.Namespace, environment: Environment) -> int:
    print(Layout.current(environment).shell())
    return 0


def _doctor(_: argparse.Namespace, environment: Environment) -> int:
    from ops import doctor

    return doctor.main(environment)


def _pass_on(command: str, words: list[str], environment: Environment) -> int:
    if command == "demo":
        from ops import demo

        return demo.main(words, environment)
    layout = Layout.current(environment)
    if command == "simulate":
        from ops import simulate

        return simulate.main(words, replace(environment, kafka_bootstrap_servers=layout.kafka))
    ray = [str(binaries_folder() / "ray"), "job", "submit", *words]
    return subprocess.run(ray, env=os.environ | layout.variables(), check=False).returncode


def lag_lines(folder: Path) -> list[str]:
    """Return a line a partition with what its worker last said about it, of all streams that run."""
    from streaming.report import read_views

    return [
        f"{view} partition {partition}: lag {state['lag']}, processed {state['processed']}, "
        f"dead {state['dead']}, late {state['late']}, watermark {state.get('watermark') or '-'}, "
        f"checkpoint {state.get('checkpoint_age_s', '-')} s ago, worker {state.get('pid', '-')}"
        for view, partitions in read_views(folder).items()
        for partition, state in sorted(partitions.items(), key=lambda item: int(item[0]))
    ]


def _is_told(error: Exception) -> bool:
    """Whether the error was raised as a sentence for users: our own errors, not those of a library or of a slip."""
    return type(error).__module__.split(".")[0] in ("ops", "streaming", "models", "serving", "evaluation")


def _silence_warnings() -> None:
    """Warnings are of libraries, about each other; they change the filters too, so what they say goes to no handler."""
    logging.captureWarnings(True)
    logger = logging.getLogger("py.warnings")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
