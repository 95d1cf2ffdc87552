"""What a person sees of an evaluation: a few lines, the pictures, report.html."""

from pathlib import Path

import numpy as np

from common.config import as_yaml
from common.errors import data_error
from common.files import read_text
from common.logbook import read_metrics
from common.report import Section, write_report
from common.volumes.volume import Volume
from em_segmentation.config import Config, Evaluation
from em_segmentation.figures import Shown, draw_errors, draw_learning_curve, draw_overlay
from em_segmentation.judging import Figures, Verdict, instance_truth, semantic_truth
from em_segmentation.volumes import Annotated


def summary(verdict: Verdict, config: Config) -> str:
    """The few lines that matter."""
    figures, lines = verdict.figures, []
    if "semantic" in config.targets.names:
        for name in config.targets.semantic_names:
            lines.append(
                f"test {name} Jaccard {figures[f'{name}_jaccard']:.3f} ({interval(figures, f'{name}_jaccard', config)}, "
                f"n = {figures[f'{name}_pieces']} pieces of {figures['test_volumes']} volumes), "
                f"Dice {figures[f'{name}_dice']:.3f}"
            )
            if f"baseline_{name}_jaccard" in figures:
                lines.append(f"  baseline {figures[f'baseline_{name}_jaccard']:.3f}: {figures['baseline_semantic']}")
            lines.append(f"  chance {figures[f'chance_{name}_jaccard']:.3f}: everything is {name}")
    if config.decoding.target != "none":
        chosen = "chosen on validation" if figures["validation_volumes"] else "of the config"
        lines += [
            f"test adapted Rand error {figures['adapted_rand_error']:.3f} ({interval(figures, 'adapted_rand_error', config)}, "
            f"n = {figures['instance_pieces']} pieces), V_rand {figures['v_rand']:.3f}, threshold "
            f"{figures['instance_threshold']:.3f} {chosen}",
            f"  VOI split {figures['voi_split']:.3f} + merge {figures['voi_merge']:.3f} bits; "
            f"{figures['num_objects']} objects for {figures['num_true_objects']} true ones",
            f"  baseline {figures['baseline_adapted_rand_error']:.3f}, VOI {figures['baseline_voi_split']:.3f} + "
            f"{figures['baseline_voi_merge']:.3f}: {figures['baseline_instances']}",
        ]
    return "\n".join(lines)


def interval(figures: Figures, name: str, config: Config) -> str:
    return f"{config.evaluation.confidence:.0%} interval {figures[f'{name}_low']:.3f} to {figures[f'{name}_high']:.3f}"


def write_pages(
    verdict: Verdict,
    volumes: list[Annotated],
    predictions: list[Volume],
    config: Config,
    settings: Evaluation,
    folder: Path,
) -> None:
    """Overlay, error map and learning curve of a run, and its report.html."""
    pictures = folder / "figures"
    sections = [figures_section(verdict.figures, config)]
    if volumes:
        shown = shown_of(verdict, volumes[0], predictions[0], config, settings)
        draw_overlay(shown, pictures / "overlay.png")
        sections.append(
            Section("First test volume: image, truth, found, in three planes", "", [], pictures / "overlay.png", "")
        )
        if shown.found_ids is not None:
            draw_errors(shown, pictures / "errors.png")
            text = (
                "Red: one found object joins several true ones here (merge). Blue: a true object is cut here (split)."
            )
            sections.append(Section("Splits and merges", text, [], pictures / "errors.png", ""))
    if (folder / "metrics.csv").exists():
        draw_learning_curve(
            read_metrics(folder / "metrics.csv", ("step", "train_loss")), pictures / "learning_curve.png"
        )
        sections.append(Section("Learning curve", "", [], pictures / "learning_curve.png", ""))
    sections.append(Section("Config", "", [], None, as_yaml(config)))
    if (folder / "environment.json").exists():
        sections.append(Section("Environment", "", [], None, read_text(folder / "environment.json")))
    write_report(folder / "report.html", f"em_segmentation: {folder.name}", sections)


def figures_section(figures: Figures, config: Config) -> Section:
    """The table of all figures."""
    rows = [["figure", "value"]] + [
        [name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)]
        for name, value in figures.items()
    ]
    where = (
        f"Thresholds were chosen on {figures['validation_volumes']} validation volumes."
        if figures["validation_volumes"]
        else "There are no validation volumes: thresholds are those of the config, the weights the last."
    )
    text = (
        f"{where} Intervals: {config.evaluation.confidence:.0%}, bootstrap over pieces of the test volumes, which are not "
        "fully independent of each other."
    )
    return Section("Figures on the test volumes", text, rows, None, "")


def shown_of(verdict: Verdict, volume: Annotated, prediction: Volume, config: Config, settings: Evaluation) -> Shown:
    """The first test volume for the pictures."""
    image = volume.read_image((0, 0, 0), volume.shape)[0]
    if not np.isfinite(image).all():
        raise data_error(f"{volume.image.path}: holds NaN or infinite voxels; export it again")
    semantic, instances = bool(verdict.masks), bool(verdict.instances)
    return Shown(
        image,
        volume.voxel_size_nm,
        semantic_truth(volume, config) if semantic else None,
        verdict.masks[0] if semantic else None,
        instance_truth(volume, config, settings) if instances else None,
        verdict.instances[0] if instances else None,
    )
