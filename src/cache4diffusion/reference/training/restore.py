"""Turn a built pipeline folder back into training folders, so that training goes on from weights that ship.

    python -m cache4diffusion.reference.training.restore scenes-flux --vae runs/vae --flow runs/flow
    python -m cache4diffusion.reference.training.flow --vae runs/vae --folder runs/flow --resume ema --minutes 240
    python -m cache4diffusion.reference.build --vae runs/vae --flow runs/flow

A built folder holds the averaged weights, rounded to bfloat16, and what ``facts.json`` says of their training. That is
all that is left of it: the optimizer starts afresh (``--resume ema``), and the loss curve has the points that the model
card kept. The updates are counted on from where they were, so that the data are new ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cache4diffusion.errors import Cache4DiffusionError, FileFormatError
from cache4diffusion.files import write_whole
from cache4diffusion.reference.folder import folder_of, load
from cache4diffusion.reference.networks import build_vae
from cache4diffusion.reference.training.flow import FlowModel

_FLOW_PARTS = ("transformer", "text_encoder", "text_encoder_2")
_HISTORY = ("updates", "seconds", "curve", "facts")


def restore(folder: Path | str, vae_folder: Path, flow_folder: Path) -> dict[str, Any]:
    """Write ``ema.safetensors`` (float32) and ``history.json`` of both training folders; return the facts.

    Args:
        folder: a folder made by `build`, or the name of a reference model.
        vae_folder: for the autoencoder; made if need be.
        flow_folder: for the denoiser and the text encoders; made if need be.

    Raises:
        UnknownNameError: there is no such folder.
        FileFormatError: it has no usable ``facts.json``, is made of other networks than those that are trained here, or
            a training folder holds a checkpoint already. Nothing is written then.
    """
    source = Path(folder) if Path(folder).is_dir() else folder_of(str(folder))
    for target in (vae_folder, flow_folder):
        if any((target / name).exists() for name in ("ema.safetensors", "state.safetensors", "history.json")):
            raise FileFormatError(f"{target} holds a checkpoint already: name another folder, or move it away.")
    try:
        facts = json.loads((source / "facts.json").read_text(encoding="utf-8"))
        histories = {name: {key: facts[name][key] for key in _HISTORY} for name in ("vae", "flow")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{source} cannot be trained on: its facts.json does not say how ({error}).") from error
    pipe = load(source)
    weights = {"vae": dict(pipe.vae.named_parameters()), "flow": {}}
    for part in _FLOW_PARTS:
        # Tied weights come once, as the trainer saves them.
        weights["flow"] |= {f"{part}.{name}": tensor for name, tensor in getattr(pipe, part).named_parameters()}
    for name, network in (("vae", build_vae()), ("flow", FlowModel())):
        wanted = {key: list(tensor.shape) for key, tensor in network.named_parameters()}
        found = {key: list(tensor.shape) for key, tensor in weights[name].items()}
        if wanted != found:
            differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
            raise FileFormatError(
                f"{source} is made of other networks than {name} trains: {len(differing)} parameters differ, such as "
                f"{differing[0]} ({found.get(differing[0], 'missing')}, trained as {wanted.get(differing[0], 'none')})."
            )
    for name, target in (("vae", vae_folder), ("flow", flow_folder)):
        tensors = {key: tensor.detach().to(torch.float32).contiguous() for key, tensor in weights[name].items()}
        write_whole(target / "history.json", json.dumps(histories[name]))
        write_whole(target / "ema.safetensors", lambda path, tensors=tensors: save_file(tensors, path))
    return facts


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="scenes-flux", help="name of a reference model, or a built folder")
    parser.add_argument("--vae", type=Path, required=True, help="training folder of the autoencoder, to be written")
    parser.add_argument("--flow", type=Path, required=True, help="training folder of the denoiser, to be written")
    args = parser.parse_args(argv)
    try:
        facts = restore(args.model, args.vae, args.flow)
    except (Cache4DiffusionError, OSError) as error:
        parser.exit(2, f"restore: {error}\n")
    print(f"{args.vae}: {facts['vae']['updates']} updates\n{args.flow}: {facts['flow']['updates']} updates")


if __name__ == "__main__":
    main()
