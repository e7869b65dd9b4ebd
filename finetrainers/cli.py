"""The verbs and their options: read the command line, load the config, hand over, answer with an exit code."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from finetrainers import __version__
from finetrainers.errors import Interrupted, RunError, UserError

if TYPE_CHECKING:
    from finetrainers.config.schema import RunConfig

DONE, FAILED, WRONG_INPUT = 0, 1, 2

VERBS = {
    "train": "encode what is not yet encoded, train, validate, checkpoint, save weights",
    "precompute": "only the encoding",
    "plan": "what would happen: clips and buckets, tokens, steps and epochs, parameters trained",
    "bench": "measure the steps of a run on this machine, and say what binds them",
    "sample": "render videos with a base model and, if given, trained weights",
    "models": "the families, variants and tasks that are supported",
    "demo": "the whole of it, offline: a small model learns a style from rendered clips",
    "doctor": "versions, devices, and which optional features work here",
    "report": "rebuild a run's report.html",
}


class _Parser(argparse.ArgumentParser):
    """Answers a wrong command line by one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"finetrainers: error: {message} (`{self.prog} --help` shows what there is)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line, one sub-parser a verb."""
    parser = _Parser(prog="finetrainers", description="Fine-tune video diffusion models.")
    parser.add_argument("--version", action="version", version=f"finetrainers {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in VERBS.items():
        options = verbs.add_parser(verb, help=summary, description=summary[0].upper() + summary[1:] + ".")
        _ADD_OPTIONS[verb](options)
        options.add_argument("--debug", action="store_true", help="show the traceback of an error")
        options.add_argument("--quiet", action="store_true", help="only warnings and errors")
    return parser


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run's config; docs/options.md lists every key")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="values that override the file's"
    )


def _precompute_options(parser: argparse.ArgumentParser) -> None:
    _config_options(parser)
    _nproc_option(parser)


def _nproc_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc", type=_positive, metavar="N", help="run N processes on this machine, through torchrun's launcher"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _train_options(parser: argparse.ArgumentParser) -> None:
    _config_options(parser)
    _nproc_option(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="go on from the newest whole checkpoint of the output folder (auto, the default), start anew and move "
        "what is there aside (never), or go on from the checkpoint at PATH",
    )


def _plan_options(parser: argparse.ArgumentParser) -> None:
    _config_options(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--nodes", type=_positive, metavar="N", help="also predict the time of a step on N nodes, for each engine"
    )
    parser.add_argument(
        "--gpus-per-node", type=_positive, default=8, metavar="N", help="GPUs of each of --nodes (default 8)"
    )
    parser.add_argument(
        "--table", action="store_true", help="instead, what each size of card needs, for LoRA and full fine-tuning"
    )


def _bench_options(parser: argparse.ArgumentParser) -> None:
    _config_options(parser)
    _nproc_option(parser)
    parser.add_argument(
        "--steps", type=_at_least_two, default=20, metavar="N", help="steps that are timed, 2 or more (default 20)"
    )
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")


def _at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be 2 or more, but is {text}")
    return int(text)


def _sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id or local diffusers folder")
    parser.add_argument("--prompt", action="append", required=True, help="what to render; may be given several times")
    parser.add_argument("--family", metavar="NAME", help="dotted name of a family of your own (model.family)")
    parser.add_argument("--image", metavar="FILE", help="first frame, for image-to-video")
    parser.add_argument("--last-image", metavar="FILE", help="last frame, where the model takes one")
    parser.add_argument("--lora", metavar="PATH", help="a LoRA file or the folder that holds it")
    parser.add_argument("--lora-scale", type=float, default=1.0, metavar="X", help="strength of the LoRA (default 1)")
    parser.add_argument("--transformer", metavar="PATH", help="a fully fine-tuned transformer/ folder")
    parser.add_argument("--output", default=".", metavar="FOLDER", help="where the mp4 files go (default: here)")
    parser.add_argument("--size", metavar="FxHxW", help="frames x height x width (default: the family's own)")
    parser.add_argument("--fps", type=float, help="frames per second (default: the family's own)")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default 30)")
    parser.add_argument("--guidance-scale", type=float, help="strength of the prompt (default: the family's own)")
    parser.add_argument("--negative-prompt", default="", help="what the video is guided away from")
    parser.add_argument("--seed", type=int, default=42, help="the same seed gives the same video (default 42)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="arithmetic (default bf16)")


def _models_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timesteps", metavar="FAMILY", help="show how a family (or the model at a path) draws its noise levels"
    )


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG.yaml", help="also check a run's captions against its model's tokenizer"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="values that override the file's"
    )


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="demo-run", metavar="FOLDER", help="where everything goes")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (default 600)")


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="output folder of a run")


_ADD_OPTIONS = {
    "train": _train_options,
    "precompute": _precompute_options,
    "plan": _plan_options,
    "bench": _bench_options,
    "sample": _sample_options,
    "models": _models_options,
    "demo": _demo_options,
    "doctor": _doctor_options,
    "report": _report_options,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 the job failed, 2 the command line, the config or the input
    is wrong, 130 or 143 interrupted by SIGINT or SIGTERM after a checkpoint was saved."""
    try:
        args = _parse(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else WRONG_INPUT
    try:
        _set_up_logging(quiet=args.quiet)
        return _run(args, sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _fail(args, error, WRONG_INPUT, f"error: {error}")
    except RunError as error:
        return _fail(args, error, FAILED, f"failed: {error}")
    except Interrupted as stop:
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.debug:
            raise
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        return _fail(args, error, FAILED, f"failed: {type(error).__name__}: {reason} (--debug shows where)")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; overrides may also stand behind options, where argparse alone would not take them."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if strange := [word for word in rest if word.startswith("-") or "overrides" not in args]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    """Load what the verb needs, and only then the verb's own module, which may import torch."""
    given = {key: value for key, value in vars(args).items() if key not in ("verb", "debug", "quiet")}
    num_processes = given.pop("nproc", None)
    if "overrides" in given:
        from finetrainers.config.load import load_config

        path, overrides = given.pop("config"), given.pop("overrides")
        config: RunConfig | None = load_config(path, overrides) if path else None
        given["config"] = config
    if num_processes is not None:
        # Only now, so that a mistake in the config is answered before anything is started.
        return importlib.import_module("finetrainers.launching").launch(argv, num_processes=num_processes)
    command = getattr(importlib.import_module(f"finetrainers.commands.{args.verb}"), args.verb)
    return command(**given)


def _fail(args: argparse.Namespace, error: BaseException, code: int, message: str) -> int:
    if args.debug:
        raise error
    if _is_first_to_fail():
        print(f"finetrainers: {message}", file=sys.stderr)
    return code


def _is_first_to_fail() -> bool:
    """Whether no other process that the same launcher started has said why it failed: what comes after the first error
    is mostly its echo."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    launcher, attempt = os.getppid(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    begun = Path(f"/proc/{launcher}")
    # With its time of birth, because the numbers of processes come again.
    born = int(begun.stat().st_mtime) if begun.exists() else 0
    mark = Path(tempfile.gettempdir()) / f"finetrainers-{launcher}-{born}-{attempt}.failed"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class _StderrHandler(logging.Handler):
    """Looks stderr up at each line, so that a live progress line can stand below the log."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _set_up_logging(*, quiet: bool) -> None:
    """Our own log on stderr, other libraries' warnings with it."""
    logging.basicConfig(level=logging.WARNING, handlers=[_StderrHandler()], format="%(message)s", force=True)
    # It warns at import that it cannot fetch a kernel which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Of several processes the main one speaks for all.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.getLogger("finetrainers").setLevel(logging.WARNING if quiet and level == logging.INFO else level)
