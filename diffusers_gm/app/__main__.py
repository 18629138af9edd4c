"""Compare samplers side by side in a browser: samples, the way to them, seconds, distance to real images, calibration.

    python -m diffusers_gm.app --model outputs/demo

Needs the `app` extra: pip install "diffusers-gm[app]". The page is served on this machine alone unless told.
"""

import logging
from collections.abc import Sequence

from ..cli import Parser
from ..extra import extra


def build_parser() -> Parser:
    parser = Parser("diffusers_gm.app", __doc__)
    add = parser.add_argument
    add("--model", default="outputs/demo", help="folder of a pipeline, or its name on the Hub")
    add("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0: to everybody on the network")
    add("--port", type=int, default=None, help="of the page [the first that is free, from 7860 on]")
    add("--browser", action="store_true", help="open a browser")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        with extra("app"):
            from .page import launch
        launch(args.model, args.host, args.port, args.browser)
    except (ImportError, OSError) as error:  # the port is taken, perhaps
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
