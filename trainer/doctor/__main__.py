"""The command. Exit code 0: fine, or warnings; 1: something fails; 2: a wrong command line, or a configuration that cannot be
read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rollout.cli import Parser
from trainer import cli
from trainer.config_file import load_config
from trainer.doctor.report import Finding, as_json, exit_code, run_checks


def main(arguments: list[str]) -> int:
    options = _parser().parse_intermixed_args(arguments)
    config = None if options.config is None else load_config(options.config, options.overrides)
    from trainer.doctor.machine import machine_checks

    findings: list[Finding] = []

    def show(checks: list) -> None:
        for found in run_checks(checks):
            findings.extend(found)
            if not options.json:
                for finding in found:
                    print(finding.line(), flush=True)

    show(machine_checks(options.seconds))
    if config is not None:
        from trainer.doctor.gpus import look
        from trainer.doctor.launch import launch_checks

        devices = look(options.seconds).devices
        smallest = min((total for _, total, _, _ in devices), default=None)
        command = [str(options.config), *options.overrides]
        show(launch_checks(config, command, len(devices), smallest, options.seconds))
    if options.json:
        print(json.dumps({"findings": as_json(findings), "exit": exit_code(findings)}, indent=1, ensure_ascii=False))
    else:
        counts = [sum(finding.status == status for finding in findings) for status in ("FAIL", "warn", "skip")]
        print(f"{counts[0]} to mend, {counts[1]} to know of, {counts[2]} not checked")
    sys.stdout.flush()
    code = exit_code(findings)
    if any("no answer within" in finding.found for finding in findings):
        os._exit(code)  # a check that hangs may hold a lock that the interpreter's end waits for
    return code


def _parser() -> Parser:
    parser = Parser(prog="python -m trainer.doctor", description="Look a machine over before a launch.")
    parser.add_argument("config", nargs="?", type=Path, help="a run's YAML: also looks at all that it names")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, as trainer.train takes them")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="for one check (default 60); some get a multiple"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
