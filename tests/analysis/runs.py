"""Run folders with made-up but plausible content, for the tests of what reads them."""

import json
from pathlib import Path

import yaml

LAYERS = {"conv1": 16, "layer1.0.conv1": 16, "layer1.0.conv2": 16, "layer2.0.conv1": 32}


def write_run(folder: Path, method: str, epochs: int = 8, top1: float = 90.0) -> Path:
    """A finished run; psap's steps are at epochs 1 to 4 and prune (epoch + l) / 10 of layer number l."""
    folder.mkdir(parents=True)
    rows = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "train/loss": 1 / epoch, "eval/top1": top1 - 10 / epoch}
        if method == "psap" and epoch <= 4:
            row |= {"psap/macs_cut": epoch / 8 + 0.01, "psap/macs_cut_target": epoch / 8}
            row |= {"psap/proposed": 12 * epoch, "psap/suspended": 10 * epoch, "psap/restored": 2 * epoch}
            for l, name in enumerate(LAYERS):
                row[f"layer/weight_sparsity_ratio/{name}"] = 0.3 + l / 20
                row[f"layer/prune_ratio/{name}"] = (epoch + l) / 10
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"dataset": "digits", "model": "resnet20", "method": method, "epochs": epochs}
    summary |= {"seed": 0, "top1": top1, "macs_cut": 0.0 if method == "dense" else 0.6}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"validation_images": 180}}))
    (folder / "done").touch()
    return folder
