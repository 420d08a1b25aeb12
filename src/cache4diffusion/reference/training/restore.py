"""Turn a built pipeline folder back into training folders, so that training goes on from weights that ship.

    python -m cache4diffusion.reference.training.restore scenes-flux --vae runs/vae --flow runs/flow
    python -m cache4diffusion.reference.training.flow --vae runs/vae --folder runs/flow --resume ema --minutes 240
    python -m cache4diffusion.reference.build --vae runs/vae --flow runs/flow

    python -m cache4diffusion.reference.training.restore scenes-dit --denoiser runs/scenes-dit

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
from cache4diffusion.reference.models import model_of
from cache4diffusion.reference.networks import build_vae

_HISTORY = ("updates", "seconds", "curve", "facts")


def restore(folder: Path | str, vae_folder: Path | None, denoiser_folder: Path) -> dict[str, Any]:
    """Write ``ema.safetensors`` (float32) and ``history.json`` of the training folders; return the facts.

    Args:
        folder: a folder made by `build`, or the name of a reference model.
        vae_folder: for the autoencoder, where the model has its own; made if need be.
        denoiser_folder: for the denoiser and the text encoders that learnt along; made if need be.

    Raises:
        UnknownNameError: there is no such folder.
        FileFormatError: it has no usable ``facts.json``, is made of other networks than those that are trained here, or
            a training folder holds a checkpoint already, or is not named. Nothing is written then.
    """
    source = Path(folder) if Path(folder).is_dir() else folder_of(str(folder))
    for target in (vae_folder, denoiser_folder):
        names = ("ema.safetensors", "state.safetensors", "history.json")
        if target is not None and any((target / name).exists() for name in names):
            raise FileFormatError(f"{target} holds a checkpoint already: name another folder, or move it away.")
    pipe = load(source)
    model = model_of(pipe)
    targets = {model.record: denoiser_folder}
    if model.has_own_vae:
        if vae_folder is None:
            raise FileFormatError(f"{model.name} has an autoencoder of its own: name a folder for it, too.")
        targets["vae"] = vae_folder
    try:
        facts = json.loads((source / "facts.json").read_text(encoding="utf-8"))
        histories = {name: {key: facts[name][key] for key in _HISTORY} for name in targets}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{source} cannot be trained on: its facts.json does not say how ({error}).") from error
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name in targets:
        if name == "vae":
            network: Any = build_vae()
            found = dict(pipe.vae.named_parameters())
        else:
            network = model.parts(0)
            # Tied weights come once, as the trainer saves them.
            found = {
                f"{part}.{key}": tensor
                for part, _ in network.named_children()
                for key, tensor in getattr(pipe, part).named_parameters()
            }
        wanted = {key: tensor.shape for key, tensor in network.named_parameters()}
        _compare(source, name, wanted, {key: tensor.shape for key, tensor in found.items()})
        learns = {key for key, tensor in network.named_parameters() if tensor.requires_grad}
        weights[name] = {key: tensor for key, tensor in found.items() if key in learns}
    for name, target in targets.items():
        tensors = {key: tensor.detach().to(torch.float32).contiguous() for key, tensor in weights[name].items()}
        write_whole(target / "history.json", json.dumps(histories[name]))
        write_whole(target / "ema.safetensors", lambda path, tensors=tensors: save_file(tensors, path))
    return facts


def _compare(source: Path, name: str, wanted: dict[str, torch.Size], found: dict[str, torch.Size]) -> None:
    if wanted == found:
        return
    differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    here, there = (list(shapes[differing[0]]) if differing[0] in shapes else None for shapes in (found, wanted))
    raise FileFormatError(
        f"{source} is made of other networks than {name} trains: {len(differing)} parameters differ, such as "
        f"{differing[0]} ({here or 'missing'}, trained as {there or 'none'})."
    )


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="scenes-flux", help="name of a reference model, or a built folder")
    parser.add_argument("--vae", type=Path, help="training folder of the autoencoder, to be written")
    parser.add_argument(
        "--denoiser", "--flow", type=Path, required=True, help="training folder of the denoiser, to be written"
    )
    args = parser.parse_args(argv)
    try:
        facts = restore(args.model, args.vae, args.denoiser)
    except (Cache4DiffusionError, OSError) as error:
        parser.exit(2, f"restore: {error}\n")
    folders = {"vae": args.vae, "flow": args.denoiser, "denoiser": args.denoiser}
    print("\n".join(f"{folder}: {facts[name]['updates']} updates" for name, folder in folders.items() if name in facts))


if __name__ == "__main__":
    main()
