"""The formats of known trainers' text logs: one entry per trainer, with the source that prints the line.

The entries for nanoGPT, nanochat, llm.c, modded-nanogpt, minimind and OLMo-core follow their sources of 2026-11-29 (the branch's
head, unless a version is given); the others follow lines that users have shown, and name the source that prints them. Order matters
where one format's line fits another's pattern: the more specific comes first.
"""

from __future__ import annotations

import math
import re

from stabilitylab.logs.pattern import ABOVE, LineValues, TextFormat, text_format

_MEGATRON_LOSSES = ("lm loss", "lm_loss", "reduced_train_loss")


def _megatron(values: LineValues, before: LineValues) -> LineValues:
    """Restore a missing ``lm loss`` as NaN: Megatron prints it only above 0, so not a NaN, nor a window of skipped steps."""
    skipped = values.get("number of skipped iterations") or 0.0
    iteration = values.get("iteration")
    window = (iteration or 1.0) - (before.get("iteration") or 0.0)
    losses = [name for name in before if "loss" in name and "scale" not in name]
    main = next((name for name in _MEGATRON_LOSSES if name in losses), losses[0] if losses else "lm loss")
    # A loss of further tokens or of a router may go on without it: "mtp_1 loss", "z_loss".
    there = main in values if losses else any("loss" in n and "scale" not in n for n in values)
    missing = len(values) > 2 and not there
    if missing and (skipped == 0 or (window > 0 and skipped < window)):
        values[main] = math.nan
    return values


def _deepspeed(values: LineValues, before: LineValues) -> LineValues:
    """The scale after an overflow holds for the steps after it, until the next overflow."""
    values.setdefault("loss_scale", before.get("loss_scale"))
    if "steps" not in values:
        return {}
    unknown = "loss" not in values or values["loss_scale"] is None
    return {name: value for name, value in values.items() if not (unknown and name == "loss_scale")}


def _without_placeholder(values: LineValues, before: LineValues) -> LineValues:
    """Drop the -1 that pipeline ranks without a loss print."""
    if values.get("loss") == -1.0:
        values["loss"] = None
    return values


def _thousands(values: LineValues, before: LineValues) -> LineValues:
    """Read steps given in thousands (``1.2kit``)."""
    if (thousands := values.pop("thousands", None)) is not None:
        values["step"] = float(round(thousands * 1000))
    return values


def _epochs(values: LineValues, before: LineValues) -> LineValues:
    """Make epoch and place in it one count."""
    epoch, place, length = values.get("epoch"), values.get("place"), values.get("length")
    if epoch is not None and place is not None and length is not None:
        values["step"] = (epoch - 1) * length + place
    return values


def _keras(values: LineValues, before: LineValues) -> LineValues:
    """A bar holds means of the epoch so far: its last one counts, once."""
    if values.get("place") != values.get("length"):
        values.pop("epoch", None)
        return {}
    if (
        "epoch" in values
        and values["epoch"] == before.get("epoch")
        and values.get("loss") == before.get("loss")
    ):
        return {}
    return {name: value for name, value in values.items() if name not in ("place", "length")}


def _yolo(values: LineValues, before: LineValues) -> LineValues:
    """The sum of the parts; for YOLOv7, the fourth column, which is that sum."""
    parts = [values.pop(name) for name in "abcde" if name in values]
    known = [part for part in parts if part is not None]
    total = sum(known[:-1])
    is_total = len(known) > 3 and abs(known[-1] - total) <= 2e-3 * max(total, 1.0)
    return {"epoch": values["epoch"], "sum of the losses": known[-1] if is_total else sum(known)}


FORMATS: tuple[TextFormat, ...] = (
    text_format(
        "Megatron-LM",  # also Megatron-DeepSpeed, GPT-NeoX
        "iteration {iteration}/ {total} |{pairs}",
        source="NVIDIA/Megatron-LM megatron/training/training.py training_log",
        trigger="iteration",
        losses=_MEGATRON_LOSSES,
        finish=_megatron,
    ),
    text_format(
        "nanotron",
        "iteration: {iteration} / {total} |{pairs}",
        source="huggingface/nanotron src/nanotron/logging",
        version="0.4",
        trigger="iteration: ",
        losses=("lm_loss",),
    ),
    text_format(
        "torchtitan",
        "step: {step} loss: {loss}{pairs}",
        source="pytorch/torchtitan torchtitan/components/metrics.py",
        version="0.3.0",
        trigger="step: ",
        losses=("loss",),
        finish=_without_placeholder,
        skip="validate step:",
        loose=True,
    ),
    text_format(
        "OLMo",
        "[step={step}/{*}]",
        source="allenai/OLMo-core src/olmo_core/train/callbacks/console_logger.py; allenai/OLMo olmo/train.py",
        version="3.0.0",
        trigger=r"\[step=",
        follow=True,
        losses=("train/CE loss", "train/CrossEntropyLoss"),
    ),
    text_format(
        "Composer",
        "[batch={batch}/{*}]:",
        source="mosaicml/composer composer/loggers/console_logger.py",
        version="0.32",
        trigger=r"\[batch=",
        follow=True,
        losses=("Train loss/train/total",),
    ),
    text_format(
        "nanoGPT",
        "iter {iter}: loss {loss}{?, time {time}ms?}",
        source="karpathy/nanoGPT train.py",
        trigger="iter ",
        loose=True,
    ),
    text_format(
        "llama2.c",
        "{iter} | loss {loss} | lr {lr} | {time}ms",
        source="karpathy/llama2.c train.py",
        trigger=r"(?m:^\d+ \| loss )",
        words=(b" | loss ",),
        loose=True,
    ),
    text_format(
        "llm.c",
        "s:{step} trl:{trl}{? lr:{lr}?}{? norm:{norm}?}",
        source="karpathy/llm.c llmc/logger.h",
        trigger="s:",
        losses=("trl",),
    ),
    text_format(
        "llm.c",
        "step {step}/{total} | {?train ?}loss {loss} {*}| norm {norm} {*}| lr {lr}",
        source="karpathy/llm.c train_gpt2.cu, train_gpt2.py",
        trigger="step ",
    ),
    text_format(
        "nanochat",
        "step {step}{?/{total}?} {?({*}%)?} | {?training ?}loss: {loss}{pairs}",
        source="karpathy/nanochat scripts/base_train.py, chat_sft.py",
        trigger="[Ss]tep ",
        words=(b"step ",),
        loose=True,
    ),
    text_format(
        "build-nanogpt",
        "{step} train {loss}",
        source="karpathy/build-nanogpt train_gpt2.py",
        trigger=r"(?m:^\d+ train )",
        words=(b" train ",),
        loose=True,
    ),
    text_format(
        "modded-nanogpt",
        "step:{step}/{total} train_loss:{train_loss}{pairs}",
        source="KellerJordan/modded-nanogpt train_gpt2.py",
        trigger="step:",
    ),
    text_format(
        "modded-nanogpt",
        "step:{step}/{total} val_loss:{val_loss}",
        source="KellerJordan/modded-nanogpt train_gpt.py",
        trigger="step:",
    ),
    text_format(
        "minimind",
        "Epoch:[{epoch}/{epochs}]( {place}/ {length}){?,?} loss:{loss}{pairs}",
        "Epoch:[{epoch}/{epochs}]( {place}/ {length}){pairs}",
        source="jingyaogong/minimind trainer/train_pretrain.py",
        trigger=r"Epoch:\[",
        losses=("loss", "Loss"),
        finish=_epochs,
    ),
    text_format(
        "fairseq",
        "epoch {epoch}:{*}loss={loss},{pairs}",
        source="facebookresearch/fairseq fairseq/logging/progress_bar.py SimpleProgressBar, TqdmProgressBar",
        version="0.6 to 0.12.2",
        trigger="num_updates=",
    ),
    text_format(  # before it counted updates
        "fairseq",
        "epoch {epoch}{?:?} {place} / {length} loss={loss}{? ({average})?}, {pairs}",
        source="facebookresearch/fairseq train.py, fairseq/progress_bar.py",
        version="0.1, 0.2",
        trigger=r"epoch \d+:?\s+\d+ / \d+ loss=",
        words=(b"epoch ",),
        finish=_epochs,
    ),
    text_format(
        "levanter",
        "Progress on:{*} {step}it/{*}postfix:{*}loss:{loss}",
        "Progress on:{*} {thousands}kit/{*}postfix:{*}loss:{loss}",
        source="marin-community/levanter src/levanter/callbacks; tqdm-loggable",
        trigger="Progress on:",
        finish=_thousands,
    ),
    text_format(
        "ESPnet",
        "{epoch}epoch:train:{first}-{batch}batch:{pairs}",
        source="espnet/espnet espnet2/train/reporter.py",
        version="202301",
        trigger="epoch:train:",
        losses=("loss",),
    ),
    text_format(
        "WeNet",
        "TRAIN Batch {epoch}/{batch} loss {loss} {*}lr {lr}",
        "TRAIN |{*}| Batch {epoch}/{batch} loss {loss} {*}lr {lr}",
        source="wenet-e2e/wenet wenet/utils/executor.py, train_utils.py",
        version="2, 3",
        trigger=r"TRAIN (?:\||Batch )",
    ),
    text_format(
        "Marian",
        "Ep. {epoch} : Up. {updates} :{*}Cost {cost}{?{*}: gNorm {gnorm}?}{?{*}: L.r. {lr}?}",
        source="marian-nmt/marian src/training/scheduler.h",
        version="1.12",
        trigger=r"Ep\. ",
        losses=("cost",),
    ),
    text_format(
        "Coqui TTS",
        "GLOBAL_STEP: {global_step}",
        source="coqui-ai/Trainer trainer/logging/console_logger.py",
        trigger="GLOBAL_STEP: ",
        follow=True,
        losses=("loss",),
    ),
    text_format(
        "MMEngine",
        "Epoch(train) [{epoch}][ {place}/{length}]{pairs}",
        "Iter(train) [ {iter}/{total}]{pairs}",
        source="open-mmlab/mmengine mmengine/runner/log_processor.py",
        version="0.10.7",
        trigger=r"(?:Epoch|Iter)\(train\)",
        words=(b"(train)",),
        losses=("loss",),
        finish=_epochs,
    ),
    text_format(
        "MMCV",
        "Epoch [{epoch}][ {place}/{length}]{pairs}",
        "Iter [ {iter}/{total}]{pairs}",
        source="open-mmlab/mmcv mmcv/runner/hooks/logger/text.py",
        version="1",
        trigger=r"(?:Epoch|Iter) \[",
        words=(b"epoch [", b"iter ["),
        losses=("loss",),
        finish=_epochs,
    ),
    text_format(
        "DeepSpeed",
        "steps: {steps} loss: {loss} {pairs}",
        "] step={steps}, skipped={skipped}, lr=[{lr}",
        "OVERFLOW! {*}Skipping step. Attempted loss scale: {*}, reducing to {loss_scale}",
        source="deepspeedai/DeepSpeed deepspeed/runtime/pipe/engine.py, engine.py _report_progress, fp16/loss_scaler.py",
        version="0.3 to 0.19",
        trigger=r"steps: |\] step=\d|OVERFLOW!",
        words=(b"steps: ", b"] step=", b"overflow!"),
        losses=("loss",),
        finish=_deepspeed,
        one_part=True,
    ),
    text_format(
        "Caffe",
        "] Iteration {iter} ({*}), loss = {loss}",
        "] Iteration {iter}, loss = {loss}",
        "] Iteration {iter}, lr = {lr}",
        source="BVLC/caffe src/caffe/solver.cpp, sgd_solver.cpp",
        version="1.0",
        trigger=r"\] Iteration ",
    ),
    text_format(
        "Darknet",
        "{iter}: {loss}, {average} avg{? loss?}, {lr} rate, {time} seconds",
        source="AlexeyAB/darknet src/detector.c; pjreddie/darknet",
        trigger=" avg(?: loss)?, ",
        words=(b" avg",),
        losses=("loss",),
    ),
    text_format(
        "Tacotron 2",
        "Train loss {step} {loss} Grad Norm {grad_norm}",
        source="NVIDIA/tacotron2 train.py",
        trigger="Train loss ",
    ),
    text_format(
        "CatBoost",
        "{iteration}: learn: {learn}{*}",
        source="catboost/catboost catboost/libs/logging; verbose training",
        version="1.2",
        trigger=r"learn: ",
        losses=("learn",),
    ),
    text_format(
        "tinygrad",
        "{step} {*} ms run,{*} {loss} loss, {*}{lr} LR",
        source="tinygrad/tinygrad examples/hlb_cifar10.py, mlperf",
        trigger=" ms run,",
    ),
    TextFormat(
        name="Keras",
        source="keras-team/keras keras/src/utils/progbar.py; keras/utils/generic_utils.py Progbar",
        version="1 to 3.15",
        trigger=re.compile(rb"\d+/\d+[^\r\n]* - loss: "),
        lines=(
            re.compile(
                r"^\s*(?P<n_place>\d+)/(?P<n_length>\d+) *(?:\[[=>.]+\]|━+)?[ -]*(?:ETA: )?\d[\w:.]*"
                r"(?: \d+[mun]?s/(?:step|epoch|sample))?(?: - \d+[mun]?s/(?:step|epoch|sample))? - (?P<pairs_>.*)"
            ),
        ),
        losses=("loss",),
        finish=_keras,
        least=3,
        above=ABOVE,
        words=(b" - loss: ",),
    ),
    # Under "Epoch GPU_mem box_loss obj_loss cls_loss Instances Size", behind a bar; running means until the bar is full.
    TextFormat(
        name="YOLO console",
        source="ultralytics/ultralytics engine/trainer.py 8; ultralytics/yolov3, yolov5 train.py; WongKinYiu/yolov7 train.py",
        trigger=re.compile(rb": 100%"),
        lines=(
            re.compile(
                r"^\s*(?P<n_epoch>\d+)/\d+\s+(?:0|[\d.]+[GM])\s+(?P<n_a>[\d.]+|nan)\s+(?P<n_b>[\d.]+|nan)"
                r"(?:\s+(?P<n_c>\d*\.\d+|nan))?(?:\s+(?P<n_d>\d*\.\d+|nan))?(?:\s+(?P<n_e>\d*\.\d+|nan))?\s+\d+\s+\d+: 100%"
            ),
        ),
        losses=("sum of the losses",),
        finish=_yolo,
    ),
    # Three parts and their sum, the batch's objects, the pictures' size, then validation's numbers; no header.
    TextFormat(
        name="YOLO results.txt",
        source="ultralytics/yolov3, yolov5 train.py; WongKinYiu/yolov7 train.py",
        version="2019 to 2022",
        trigger=re.compile(rb"(?m:^ +\d+/\d+ +[\d.]+G +\S)"),
        lines=(
            re.compile(
                r"^ +(?P<n_epoch>\d+)/\d+ +[\d.]+G(?: +(?:[\d.e+-]+|nan)){3} +(?P<n_sum>[\d.e+-]+|nan) +\d+ +\d+"
                r"(?: +(?:[\d.e+-]+|nan)){5,}\s*$"
            ),
        ),
        losses=("sum",),
        words=(b"g  ",),
    ),
    # Its header is three lines high: Epoch, Iteration, time, accuracy or error, loss, rate.
    TextFormat(
        name="MATLAB",
        source="MATLAB trainNetwork, trainnet",
        version="R2023b",
        trigger=re.compile(rb"\|\s+\d+ \|\s+\d+ \|\s+\d\d:\d\d:\d\d \|"),
        lines=(
            re.compile(
                r"\|\s+(?P<n_epoch>\d+) \|\s+(?P<n_iteration>\d+) \|\s+[\d:]+ \|\s+[\d.]+%? \|\s+(?P<n_loss>[\d.eE+-]+|NaN) \|"
                r"\s+(?P<n_lr>[\d.eE+-]+) \|"
            ),
        ),
        words=(b"|       ",),
    ),
    # A dictionary that pprint broke over lines: EasyLM, own scripts.
    TextFormat(
        name="printed dictionaries",
        source="young-geng/EasyLM EasyLM/models/llama/llama_train.py",
        trigger=re.compile(rb"(?m:^(?=\S)[^\r\n]*?\{'[\w/ .()-]+': [^{}\r\n]*,[ \t]*\r?$)"),
        lines=(re.compile(r"\{(?P<pairs_>'[^{}]*,)\s*$"),),
        follow=True,
        words=(b"{'",),
        above=ABOVE,
    ),
)
