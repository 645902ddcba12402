"""Train: fine-tune the base model on (anchor, positive) pairs with in-batch negatives; validation rows choose.

Usage   python stages/train.py SEED   (one of train.seeds in params.yaml)
Reads   data/prepared/{train,validation,corpus}.jsonl, models.base
Writes  models/finetuned/<seed>/, metrics/train/<seed>.json (score on validation rows and what was chosen by it),
        metrics/curves/<seed>/{loss,validation}.csv, metrics/environment/train@<seed>.json
        models/scratch/<fingerprint>/: checkpoints (until the run ends) and TensorBoard logs; nobody's output

With train.processes above 1 it starts itself that many times. Several hosts that share this folder start it by
`accelerate launch --multi_gpu` each (README).
"""

import argparse
import atexit
import dataclasses
import hashlib
import json
import math
import os
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from shared import records, sources
from shared.errors import InputError, run
from shared.params import ROOT, Params, TrainParams, nearest, read_params

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

SCRATCH = ROOT / "models/scratch"
SEAL = "seal.json"  # in a checkpoint: the hash of each of its files, written last
KEPT = 2  # newest checkpoints on disk while training, beside the best one: the newest may be damaged
# The library's arguments that have a plain name in params.yaml.
PLAIN_NAMES = {
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "bf16": "precision",
    "fp16": "precision",
    "eval_steps": "evaluations",
    "save_steps": "checkpoints",
    "seed": "seeds",
}
# As retrieval does it: a model may have a module, or a longest text, for each.
ROUTES = {"anchor": "query", "positive": "document"}
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
# Arguments on which the promises of this stage rest: one score an evaluation, and the same model after a cut.
SET_BY_THE_PIPELINE = {
    "metric_for_best_model",
    "load_best_model_at_end",
    "prompts",
    "max_steps",
    "eval_delay",
    "eval_on_start",
    "dataloader_drop_last",
    "save_only_model",
    "ignore_data_skip",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seed", type=int)
    seed = parser.parse_args().seed
    params = read_params()
    if seed not in params.train.seeds:
        raise InputError(f"params.yaml: train.seeds is {params.train.seeds}, which has no {seed}; add it there first")
    train, validation, corpus = records.read_split("train"), records.read_split("validation"), records.read_corpus()
    base = sources.model_folder(params.models.base, "base")
    left_out = check_batches(train, params.train)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1 < params.train.processes:
        sys.exit(launch(params.train.processes))
    if processes != params.train.processes:
        raise InputError(f"params.yaml: train.processes is {params.train.processes}, and {processes} were started")
    if processes == 1:
        # The trainer would divide a process's batch among all GPUs that it sees, without the others' negatives.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]

    # Ten seconds of imports: after the checks above, so that errors come at once.
    from accelerate.utils import broadcast_object_list, convert_outputs_to_fp32
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer

    from shared import by_length, encoders, environment, retrieval
    from shared.loss import ChunkedRankingLoss

    # 1. The model, and what it is judged by.
    metric = params.evaluate.primary_metric
    scratch = SCRATCH / fingerprint(params, seed, base)
    arguments = training_arguments(params.train, seed, scratch)
    (scratch,) = broadcast_object_list([scratch])  # hosts that differ name it differently: the main process's counts
    is_main_process = arguments.process_index == 0
    if is_main_process:
        lock(seed)
    model = encoders.load_encoder(base, params.models.base)
    evaluator = retrieval.make_evaluator(validation, corpus, params.evaluate.batch_size, keep_rankings=False)
    # Encoded in the precision of training, and compared in float32, in which near scores do not tie.
    precision = autocast(arguments, model.device)
    evaluator.embed_inputs = convert_outputs_to_fp32(precision(evaluator.embed_inputs))
    score_name = f"{model.similarity_fn_name}_{metric}"

    # 2. The data: the loss takes the first column as the query and every further column as a passage.
    pairs = Dataset.from_list([{"anchor": row["anchor"], "positive": row["positive"]} for row in train])

    # 3. Training, from the last whole checkpoint of this same run if it was cut. The main process says from which.
    set_dropout(model, params.train.dropout)
    arguments = dataclasses.replace(
        arguments,
        output_dir=str(scratch),
        metric_for_best_model=f"eval_{score_name}",
        prompts=prompts(model),
        router_mapping=arguments.router_mapping or ROUTES,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs,
        loss=ChunkedRankingLoss(
            model,
            precision,
            **by_length.chunk_shape(model, arguments.bf16),
            gradient_share=params.train.gradient_share,
            gather_across_devices=processes > 1,
            **loss_options(params.train, model),
        ),
        evaluator=evaluator,
        callbacks=[watch(scratch)],
    )
    (checkpoint,) = broadcast_object_list([last_whole_checkpoint(scratch) if is_main_process else None])
    trainer.train(resume_from_checkpoint=checkpoint)
    if not is_main_process:
        return

    # 4. The checkpoint that validation prefers; with a share of the base model's weights in it, if it prefers that.
    state = trainer.state
    best = scratch / f"checkpoint-{state.best_global_step}"
    model, base_share, score = encoders.load_encoder(best, best.name), 0.0, state.best_metric
    if params.train.base_share:
        untrained = encoders.load_encoder(base, params.models.base).state_dict()
        model.load_state_dict(mixed(model.state_dict(), untrained, params.train.base_share))
        score_mixed = evaluator(model)[score_name]
        if score_mixed > score:
            base_share, score = params.train.base_share, score_mixed
        else:
            model = encoders.load_encoder(best, best.name)
    save_model(model, records.FINETUNED / str(seed))
    loss, scores = (
        [(entry["step"], records.rounded(entry[name])) for entry in state.log_history if name in entry]
        for name in ("loss", f"eval_{score_name}")
    )
    curves = records.CURVES / str(seed)
    records.write_csv(curves / "loss.csv", ["step", "loss"], loss)
    records.write_csv(curves / "validation.csv", ["step", "score"], scores)
    chosen = {"validation": records.rounded(score), "step": state.best_global_step, "base_share": base_share}
    chosen |= {"left_out_at_least": left_out, "precision": in_words(choose_precision(params.train.precision))}
    records.write_json(records.METRICS / f"train/{seed}.json", chosen)
    records.write_json(records.ENVIRONMENT / f"train@{seed}.json", environment.describe())
    for path in reversed(checkpoints(scratch)):  # the newest first, so that those left by a cut are a run's beginning
        shutil.rmtree(path)
    print(
        f"models/finetuned/{seed}: validation {metric} {score:.4f},"
        f" of step {state.best_global_step} with {base_share:g} of the base model"
    )


def check_batches(train: list[records.Row], params: TrainParams) -> int:
    """How many pairs an epoch leaves out at least; says so where their texts repeat too often.

    A batch has each passage and query once, and an epoch as many batches as its pairs would fill; the sampler, which
    takes what comes first, may leave out some more. Raises InputError where several processes, which leave incomplete
    batches out, cannot fill theirs.
    """
    size, several = params.batch_size, params.processes > 1
    batches = len(train) // size if several else math.ceil(len(train) / size)
    counts = [Counter(row[column] for row in train) for column in ("anchor", "positive")]
    seen = min(sum(min(count, batches) for count in of_texts.values()) for of_texts in counts)
    where = f"params.yaml: train.batch_size is {size}, and a batch has each passage and query once"
    if several and seen < max(batches, 1) * size:
        raise InputError(
            f"{where}: {len(train)} training pairs do not fill batches, and several processes leave incomplete ones"
            " out; take a smaller one"
        )
    if not several and seen < len(train):
        text, count = max((of_texts.most_common(1)[0] for of_texts in counts), key=lambda found: found[1])
        print(
            f"note: {where}: an epoch leaves out {len(train) - seen} of {len(train)} pairs or more ({text!r:.40} stands"
            f" in {count}); take a smaller one, or fewer such pairs"
        )
    if math.ceil(params.epochs * batches) == 1 and params.warmup:
        print("note: this training has a single step, whose rate is that with which the warm-up begins: 0")
    return len(train) - min(seen, batches * size)


def launch(processes: int) -> int:
    """Run `main` in each of so many processes, which end when this one or one of them does; the exit code.

    Not by torchrun, whose processes leave the process group, so that they would outlive a killed `dvc repro`.
    """
    from torch.multiprocessing import ProcessExitedException, spawn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    try:
        spawn(launched, nprocs=processes)
    except ProcessExitedException as error:
        return abs(error.exit_code)
    return 0


def launched(rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    run(main)


def fingerprint(params: Params, seed: int, base: Path) -> str:
    """Names all that the run depends on: params, data, code, machine, versions. Its checkpoints serve no other run."""
    from shared import environment

    code = [Path(__file__), *sorted((ROOT / "stages/shared").glob("*.py"))]
    data = [records.PREPARED / f"{name}.jsonl" for name in ("train", "validation", "corpus")]
    parts = {
        "seed": seed,
        "train": params.train.model_dump(exclude={"seeds"}),
        "evaluate": params.evaluate.model_dump(exclude={"minimum_gain"}),
        "precision": choose_precision(params.train.precision),
        "environment": environment.describe(),
        "code and data": [(path.name, sha256(path)) for path in code + data],
        "base": hashes(base),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(seed: int) -> None:
    """Held until this process ends, however it ends. Raises InputError where another one holds it."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    file = FileLock(SCRATCH / f"seed-{seed}.lock")
    try:
        file.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another process is training seed {seed} here; wait until it ends, or stop it (`pgrep -af train.py` tells)"
        ) from None
    atexit.register(file.release)


def training_arguments(train: TrainParams, seed: int, scratch: Path) -> "SentenceTransformerTrainingArguments":
    """The library's arguments: what params.yaml names, this pipeline's own, then train.arguments. Raises InputError."""
    import torch
    from sentence_transformers import SentenceTransformerTrainingArguments
    from sentence_transformers.base.sampler import BatchSamplers
    from transformers import get_scheduler

    # Shares of all steps; below 1 also for a single one, since 1 would mean each step.
    evaluation, save = (1 / count - 1e-9 for count in (train.evaluations, train.checkpoints))
    fixed = {
        "output_dir": str(scratch),
        "learning_rate": train.learning_rate,
        "num_train_epochs": train.epochs,
        "per_device_train_batch_size": train.batch_size,
        "warmup_steps": train.warmup,  # a float below 1 is a share of all steps
        "seed": seed,
        "eval_strategy": "steps",
        "eval_steps": evaluation,
        "save_strategy": "steps",
        "save_steps": save,
        "save_total_limit": None,  # the callback removes old checkpoints, once the new one is sealed
        "greater_is_better": True,
        "batch_sampler": BatchSamplers.NO_DUPLICATES,  # a passage twice in a batch would be its own negative
        "logging_nan_inf_filter": False,  # it would hide what the callback looks for
        "report_to": "tensorboard",
        "use_cpu": not torch.accelerator.is_available(),
    } | choose_precision(train.precision)
    if train.processes > 1:
        # Each process takes its part of the same batches as one process would. Of the last batch of an epoch, which may
        # be smaller, not each would have a part.
        fixed |= {"accelerator_config": {"split_batches": True}, "dataloader_drop_last": True}
    open_to_change = {"logging_steps": 0.02}  # a share of all steps: 50 points on the loss curve
    valid = {field.name for field in dataclasses.fields(SentenceTransformerTrainingArguments) if field.init}
    own = fixed.keys() | PLAIN_NAMES.keys() | SET_BY_THE_PIPELINE
    types = get_type_hints(SentenceTransformerTrainingArguments)
    own_arguments = {}
    for name, value in train.arguments.items():
        where = f"params.yaml: train.arguments.{name}"
        if name in PLAIN_NAMES:
            raise InputError(f"{where}: set train.{PLAIN_NAMES[name]} instead")
        if name in own or name.startswith(("push_to_hub", "hub_")):
            raise InputError(f"{where} is the pipeline's own business and cannot be set")
        if name not in valid:
            raise InputError(
                f"{where} is unknown to SentenceTransformerTrainingArguments{nearest(name, sorted(valid - own))}"
            )
        try:
            own_arguments[name] = TypeAdapter(types[name]).validate_python(value)  # `off` is a text in YAML
        except ValidationError as error:
            raise InputError(f"{where} is {value!r}: {error.errors()[0]['msg']}") from None
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(scratch / "tensorboard")
    try:
        arguments = SentenceTransformerTrainingArguments(**fixed, **open_to_change | own_arguments)
        # What the library looks at only once all is loaded.
        arguments.get_process_log_level()
        optimizer = torch.optim.SGD([torch.zeros(1)])
        get_scheduler(
            arguments.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=arguments.lr_scheduler_kwargs
        )
        return arguments
    except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
        raise InputError(f"params.yaml: train.arguments: {error}".splitlines()[0]) from error


def choose_precision(precision: str) -> dict[str, bool]:
    """The library's flags. auto is bf16 on a device that multiplies in it, else fp16 on a GPU. Raises InputError."""
    import torch

    from shared.environment import processor_has_bf16

    has_cuda = torch.cuda.is_available()
    if precision == "auto":
        has_bf16 = torch.cuda.is_bf16_supported(False) if has_cuda else processor_has_bf16()
        precision = "bf16" if has_bf16 else "fp16" if has_cuda else "fp32"
    if precision == "fp16" and not has_cuda:
        raise InputError("params.yaml: train.precision is fp16, which needs a CUDA GPU, and there is none; take auto")
    return {"bf16": precision == "bf16", "fp16": precision == "fp16"}


def in_words(precision: dict[str, bool]) -> str:
    return next((name for name, chosen in precision.items() if chosen), "fp32")


def autocast(arguments: "SentenceTransformerTrainingArguments", device: "torch.device") -> "torch.autocast":
    """The context in which the model runs in the precision of its training."""
    import torch

    dtype = torch.float16 if arguments.fp16 else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=arguments.bf16 or arguments.fp16)


def set_dropout(model: "SentenceTransformer", share: float | Literal["model"]) -> None:
    """Of all layers, for training; the saved configuration stays as it is, and is what `model` takes."""
    from torch.nn import Dropout

    if share == "model":
        return
    for layer in model.modules():
        if isinstance(layer, Dropout):
            layer.p = share
        # T5's attention, for one, has no Dropout layer, but a number.
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(layer, name, None), float):
                setattr(layer, name, share)


def prompts(model: "SentenceTransformer") -> dict[str, str]:
    """The model's own prompts by column, so that it is trained as `encode_query` and `encode_document` will use it."""
    by_column = {"anchor": model.prompts.get("query"), "positive": model.prompts.get("document")}
    return {column: prompt for column, prompt in by_column.items() if prompt}


def loss_options(train: TrainParams, model: "SentenceTransformer") -> dict[str, Any]:
    """Of MultipleNegativesRankingLoss, which compares texts as retrieval will.

    Scale and hardness are for cosines, which lie in -1 to 1.
    """
    is_cosine = model.similarity_fn_name == "cosine"
    return {
        "scale": train.scale if is_cosine else 1.0,
        "similarity_fct": similarity_of(model),
        "hardness_mode": "in_batch_negatives",
        "hardness_strength": train.hardness if is_cosine else train.hardness / train.scale,
        **(SYMMETRIC if train.symmetric else {}),
    }


def similarity_of(model: "SentenceTransformer") -> Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]:
    """As retrieval compares embeddings: of a model with a truncate_dim, the first dimensions alone."""

    def similarity(one: "torch.Tensor", other: "torch.Tensor") -> "torch.Tensor":
        return model.similarity(one[:, : model.truncate_dim], other[:, : model.truncate_dim])

    return similarity


def watch(scratch: Path):
    """The trainer's callback of this pipeline."""
    from accelerate import PartialState
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save |= control.should_evaluate  # what is scored may be chosen
            # A logged loss is the mean since the last log. Where that span crossed a checkpoint, a run that goes on
            # from it would know only a part, and write another curve than an undisturbed run.
            control.should_log |= control.should_save

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            loss = logs.get("loss", logs.get("train_loss", 0.0))
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss is {loss} at step {state.global_step}: training has diverged. Lower train.learning_rate,"
                    " or take train.precision: fp32; if it is so at the first steps, models.base is damaged"
                )

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            PartialState().wait_for_everyone()  # each process has written its own random state
            if state.is_world_process_zero:
                seal(scratch / f"checkpoint-{state.global_step}")
                newest = checkpoints(scratch)[-KEPT:]
                for path in checkpoints(scratch):
                    if path not in newest and path not in map(best_up_to, newest):
                        shutil.rmtree(path)

    return Watch()


def checkpoints(scratch: Path) -> list[Path]:
    return sorted(scratch.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def hashes(model: Path) -> dict[str, str]:
    files = sorted(path for path in model.rglob("*") if path.is_file() and path.name != SEAL)
    return {path.relative_to(model).as_posix(): sha256(path) for path in files}


def seal(checkpoint: Path) -> None:
    records.write_json(checkpoint / SEAL, hashes(checkpoint))


def is_whole(checkpoint: Path) -> bool:
    """Whether its last file was written and none has changed since."""
    try:
        return json.loads((checkpoint / SEAL).read_text()) == hashes(checkpoint)
    except (FileNotFoundError, ValueError):
        return False


def last_whole_checkpoint(scratch: Path) -> str | None:
    """The newest checkpoint that is whole, as is the best one up to it; newer and damaged ones are removed."""
    found = checkpoints(scratch)
    whole = [path for path in found if is_whole(path)]
    last = next((path for path in reversed(whole) if best_up_to(path) in whole), None)
    for path in reversed(found):
        if path not in whole:
            print(f"{path.relative_to(ROOT)} is damaged or was not finished: passed over")
        if path not in whole or last is None or found.index(path) > found.index(last):
            shutil.rmtree(path)
    if last is None:
        return None
    print(f"going on from {last.relative_to(ROOT)} (a warning that shares are not step counts is harmless)")
    return str(last)


def best_up_to(checkpoint: Path) -> Path:
    """The checkpoint with the best score so far; before the first evaluation, this one."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return checkpoint.with_name(f"checkpoint-{state['best_global_step'] or state['global_step']}")


def mixed(
    trained: dict[str, "torch.Tensor"], untrained: dict[str, "torch.Tensor"], share: float
) -> dict[str, "torch.Tensor"]:
    """Weights on the line between a model and the one that it was trained from, `share` of the latter."""
    return {
        name: weight.lerp(untrained[name], share) if weight.is_floating_point() else weight
        for name, weight in trained.items()
    }


def save_model(model: "SentenceTransformer", folder: Path) -> None:
    """The model's folder, whole or not at all; the same weights give the same bytes."""
    with records.new_folder(folder) as new:
        model.save_pretrained(str(new), create_model_card=False)  # a card would hold dates and random samples
        for path in new.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0600, which a shared cache cannot serve


if __name__ == "__main__":
    run(main)
