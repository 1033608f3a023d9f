"""Write the model of a finished run in a form that other programs read.

    fastlt export runs/mine --to timm                     # runs/mine/model, which a run also leaves at its end
    fastlt export runs/mine --to onnx --preprocess        # runs/mine/mine.onnx, which takes uint8 images
    fastlt export runs/mine --to onnx --opset 18 --dynamic-size --precision fp16 --out half.onnx
    fastlt export runs/mine --to torch --out mine.pt2
    fastlt export runs/mine --to timm --push OWNER/NAME   # to the Hugging Face hub, with a card
    fastlt export runs/a runs/b --to onnx --out both.onnx                 # the mean of their probabilities

timm: a folder for timm.create_model("local-dir:FOLDER", pretrained=True). onnx: for onnxruntime and others, any number
of images a batch; needs the extra `export`. torch: a program of torch.export, any batch. torchscript: the older form.
Each is checked against the trained model on validation images of the run, or on those of --images where the data set is
not there any more. The largest difference of logits is printed. Above 1e-4 nothing is written; with --precision fp16,
above 2 % of the largest logit. With --dynamic-size the check is made in four sizes.
Exit code: 0 done, 2 for a run that cannot be exported so.
"""

from __future__ import annotations

from fastlt.arguments import make_parser, path, positive
from fastlt.run.folder import SELECTIONS

NAME = "fastlt export"


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code. ValueError for what cannot be exported."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="folders of finished runs, or of their models"
    )
    parser.add_argument("--to", required=True, choices=("timm", "onnx", "torch", "torchscript"), help="the form")
    parser.add_argument("--out", type=path, metavar="PATH", help="file, or folder of timm (default: in the run folder)")
    parser.add_argument(
        "--checkpoint", choices=SELECTIONS, help="which model of the last stage (default: the run's result)"
    )
    network = parser.add_argument_group("how the network is written, but for timm")
    network.add_argument("--preprocess", action="store_true", help="take uint8 images and normalise them inside")
    network.add_argument("--dynamic-size", action="store_true", help="take images of any height and width")
    network.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of the weights (fp32)")
    network.add_argument("--opset", type=positive, metavar="N", help="of ONNX (default: torch's)")
    parser.add_argument("--images", nargs="+", type=path, metavar="FILE", help="images to check the export by")
    parser.add_argument("--push", metavar="REPO", help="upload to the Hugging Face hub as OWNER/NAME (form timm)")
    parser.add_argument("--private", action="store_true", help="with --push: a repository that others cannot see")
    given = parser.parse_args(words)
    if given.push and given.to != "timm":
        raise ValueError(f"--push uploads what timm reads, and --to is {given.to}; give --to timm")
    if given.private and not given.push:
        raise ValueError("--private says how --push uploads; give --push REPO")

    import torch

    from fastlt.export.model_export import check_export, export_model
    from fastlt.export.options import ExportOptions
    from fastlt.run.trained import load_trained, read_finished

    several = len(given.runs) > 1
    options = ExportOptions(given.preprocess, given.dynamic_size, given.precision, given.opset)
    for folder in given.runs:
        read_finished(folder)
    check_export(given.to, options, several=several)
    if given.push:
        from fastlt.export.hub import check_push

        check_push(given.push)
    trained = [load_trained(folder, torch.device("cpu"), given.checkpoint) for folder in given.runs]
    made = export_model(trained, given.to, given.out, options=options, images=given.images)
    gives = "the log of the mean probability" if several else "logits"
    print(f"{made.path}: the largest difference of {gives} is {made.difference:.2g}, on {made.images}")
    print(f"takes {made.takes}")
    if given.to != "timm":
        return 0
    print(f'timm.create_model("local-dir:{made.path}", pretrained=True)')
    if given.push:
        from fastlt.export.hub import push

        print(push(trained[0], given.push, private=given.private))
    return 0
