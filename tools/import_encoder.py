"""Import a published vision encoder: InternViT, SigLIP, SigLIP 2 at fixed resolution, DINOv2.

SOURCE is a folder with config.json and safetensors or .bin files: the encoder alone, or a larger
model that contains it (an InternVL chat model, SigLIP with its text tower). OUT becomes the folder
for model.encoder_config_path and init.encoder_weights. No code of the source is run.

examples:
  python tools/import_encoder.py downloads/InternViT-6B-448px-V2_5 weights/internvit --verify
  python tools/import_encoder.py --from-hub google/siglip2-large-patch16-256 weights/siglip2
  python tools/import_encoder.py downloads/InternVL3-78B weights/internvit --dtype bf16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.conversion.pretrained_encoders import import_encoder, verify_import
from vqrae_ds.conversion.source_weights import download
from vqrae_ds.models.weights import DTYPES

_DTYPES = {"keep": None, **DTYPES}


def main() -> None:
    """Parse the command line, import, and verify if asked to."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, nargs="?", help="checkpoint folder")
    parser.add_argument("output", metavar="OUT", type=Path, help="new folder for the encoder")
    parser.add_argument(
        "--from-hub", metavar="NAME", help="instead of SOURCE: a model of the hub, all its weights"
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="keep", help="of the weights; default: as they are"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read OUT back and compare every element"
    )
    # Intermixed: SOURCE may be absent, and would otherwise be taken for OUT before an option.
    args = parser.parse_intermixed_args()
    if (args.source is None) == (args.from_hub is None):
        parser.error("give SOURCE, or --from-hub NAME instead of it")

    source, dtype = args.source or download(args.from_hub), _DTYPES[args.dtype]
    done = import_encoder(source, args.output, dtype=dtype, progress=True)
    if args.verify:
        verify_import(source, args.output, dtype=dtype, progress=True)
    family = done.family.split()[0]
    print(
        f"{args.output}: {done.family}, {done.num_blocks} blocks x {done.hidden_size}, "
        f"{done.num_parameters:,} parameters, {done.dtype}{', verified' if args.verify else ''}\n"
        "in the YAML of a run:\n"
        f"  model: {{encoder_cls: {family}, encoder_config_path: {args.output}}}"
        f"   # or {family}wNorm, with a last norm without learned scale and shift\n"
        f"  init: {{encoder_weights: {args.output}}}"
    )


if __name__ == "__main__":
    run_tool(main)
