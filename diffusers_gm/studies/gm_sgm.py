"""GM-SGM's claims, measured: each command writes a table, a picture and a verdict.

    python -m diffusers_gm.studies.gm_sgm claim        a network that works out its own noise level, and what for
    python -m diffusers_gm.studies.gm_sgm increments   tails of mixture noise against the alpha-stable law
    python -m diffusers_gm.studies.gm_sgm rare_modes   rare and far modes: jumps, or steps on the first level

Finished trainings and measurements are kept in the folder `.parts` of `--output`: a second run takes up where the first
ended.
"""

from ..cli import at_least
from .command import parse, study_parser
from .increments import increments
from .own_level import claim
from .rare_modes import rare_modes

STUDIES = {f.__name__: f for f in (claim, increments, rare_modes)}


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("gm_sgm", __doc__, STUDIES)
    parser.add_argument("--calls", type=at_least(2), nargs="+", help="numbers of network calls")
    parser.add_argument(
        "--trainings", type=at_least(1), default=1, help="claim: trainings that the seeds take turns with"
    )
    args = parse(parser, argv, over_floor=("claim",))
    if args.study == "rare_modes" and args.calls and min(args.calls) < 12:
        parser.error(f"--calls {args.calls}: rare_modes needs at least 12")
    STUDIES[args.study](args).write(args.output)


if __name__ == "__main__":
    main()
