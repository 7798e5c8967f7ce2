"""`kvstrata generate`: text from the real model at a level of the golden model."""

from pathlib import Path
from typing import Annotated

import typer

POLICIES = ("dense", "lambda")
OF_A_DEVICE = ("placement", "engine", "context", "sparse", "image", "memory", "check", "save")
"""Options that mean nothing to the golden model."""
OF_A_WINDOW = ("sinks", "window")


def _require_a_use(
    context: typer.Context, device: str | None, placement: str, policy: str, level: str
) -> None:
    """KVStrataError for a given option that the run would not look at."""
    from golden.spec import KVStrataError

    def given(names: tuple[str, ...]) -> str | None:
        sources = {name: context.get_parameter_source(name) for name in names}
        return next(
            (name for name, source in sources.items() if source and source.name == "COMMANDLINE"), None
        )

    if device is None and (name := given(OF_A_DEVICE)):
        raise KVStrataError(f"--{name} is of a device; got it without --device")
    if policy != "lambda" and placement != "engine+csd" and (name := given(OF_A_WINDOW)):
        raise KVStrataError(
            f"--{name} is of policy lambda or placement engine+csd; got {policy}, {placement}"
        )
    if device is not None and level != "exact":
        raise KVStrataError(f"a device computes at level exact; got {level}")


def command(
    options: typer.Context,
    prompt: Annotated[str, typer.Option(help="what to ask")],
    also: Annotated[
        list[str] | None,
        typer.Option(help="another prompt of the same batch on a device's engine; repeat for more"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="tokens to write at most")] = 32,
    level: Annotated[str, typer.Option(help="float, or exact: the engine's integer arithmetic")] = "exact",
    weights: Annotated[str, typer.Option(help="weight format of the exact level: w8, w4, w2, w2s24")] = "w4",
    kv: Annotated[str, typer.Option(help="KV cache format of the exact level: kv4, kv8")] = "kv4",
    device: Annotated[
        str | None,
        typer.Option(
            help="golden, rtl or timing: execute the compiled engine programs; none: the golden model"
        ),
    ] = None,
    placement: Annotated[
        str, typer.Option(help="attention on a device's engine, csd, or engine+csd")
    ] = "engine",
    engine: Annotated[str, typer.Option(help="engine of a device: tiny, small or u280")] = "small",
    context: Annotated[int, typer.Option(min=1, help="tokens that a device's KV cache holds")] = 512,
    sparse: Annotated[
        int | None, typer.Option(min=1, help="SparF in the drive: attend to one token in so many")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="dense, or lambda: sinks and window alone (exact level, or a device's engine)")
    ] = "dense",
    sinks: Annotated[int, typer.Option(min=0, help="first tokens kept for lambda and engine+csd")] = 4,
    window: Annotated[
        int, typer.Option(min=1, help="recent tokens kept for lambda, or on the engine for engine+csd")
    ] = 64,
    image: Annotated[
        Path | None,
        typer.Option(help="images of `pack` for a device; none: packed when they are not there yet"),
    ] = None,
    memory: Annotated[
        str, typer.Option(help="memory of device rtl or timing: hbm, random, or a fixed latency in cycles")
    ] = "hbm",
    raw: Annotated[bool, typer.Option("--raw", help="continue the prompt instead of answering it")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="run the golden device too and demand equal tokens and logits")
    ] = False,
    lockstep: Annotated[
        bool,
        typer.Option(
            "--lockstep",
            help="run the golden decoder beside a device and stop at the first tensor that differs",
        ),
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="also write a device's result as JSON to this file")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="GGUF file or checkpoint folder; SmolLM2-135M if none")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Answer a prompt greedily and print the text with its speed."""
    import json
    import time
    from dataclasses import replace

    from golden.lambda_window import LambdaWindow
    from golden.llama import build, check_build, generate, load_model
    from golden.spec import KVStrataError
    from hw.flow.cache import write_atomically
    from sw_stack.chain.language import check_prompt
    from sw_stack.cli.output import console, note, show_json

    prompts = [prompt, *(also or [])]
    for one in prompts:
        check_prompt(one)
    if also and device is None:
        raise KVStrataError(f"a batch runs on a device; got {len(prompts)} prompts and none")
    if lockstep and (device is None or also):
        raise KVStrataError(f"lockstep needs a device and one prompt; got {device} and {len(prompts)}")
    if policy not in POLICIES:
        raise KVStrataError(f"a policy is one of {', '.join(POLICIES)}; got {policy!r}")
    _require_a_use(options, device, placement, policy, level)
    kept = LambdaWindow(sinks, window) if policy == "lambda" else None
    check_build(level if device is None else "exact", weights, kv, kept)
    if device is not None:
        from golden.storage.decoder import Sparsity, Split
        from sw_stack.runtime.generate import batch_on_device, on_device
        from sw_stack.runtime.machine import Setup

        sparsity = Sparsity(ratio=sparse) if sparse else None
        split = Split(sinks, window)
        setup = Setup(
            engine, device, placement, weights, kv, context, sparsity, split, kept, memory, len(prompts)
        )
    checkpoint = load_model(model)
    if checkpoint.tokenizer is None:
        raise KVStrataError(f"generating text needs a tokenizer, and {model} holds none")
    if device is not None:
        with console.status("starting") as status:
            if also:
                runs = batch_on_device(checkpoint, setup, prompts, tokens, status.update, not raw, image)
            else:
                run = on_device(checkpoint, setup, prompt, tokens, status.update, not raw, image, lockstep)
                runs = [run]
            if check:
                # What a batch wrote is what each prompt alone gets, from an image without a batch's caches.
                alone = replace(setup, device="golden", sequences=1)
                given = None if also else image
                for run in runs:
                    run.require_equal(
                        on_device(checkpoint, alone, run.prompt, tokens, status.update, not raw, given)
                    )
        results = [{**run.to_json(), "equal_to_golden": check or None} for run in runs]
        result = {"batch": results} if also else results[0]
        if save is not None:
            write_atomically(save, json.dumps(result, indent=1) + "\n")
        if as_json:
            show_json(result)
            return
        for run in runs:
            typer.echo(run.text)
            note(run.summary() + ("; equal to golden in all tokens and logits" if check else ""))
        return
    decoder = build(checkpoint, level, weights, kv, kept)
    ids = checkpoint.tokenizer.encode(prompt if raw else checkpoint.tokenizer.chat(prompt))
    start = time.perf_counter()
    with console.status("thinking") as status:
        seen: list[int] = []

        def show(token: int) -> None:
            seen.append(token)
            status.update(f"{len(seen)}/{tokens} tokens")

        answer = generate(decoder, ids, tokens, checkpoint=checkpoint, on_token=show)
    seconds = time.perf_counter() - start
    if as_json:
        facts = {"prompt": prompt, "level": level, "text": answer.text, "tokens": answer.tokens}
        show_json({**facts, "seconds": round(seconds, 3)})
        return
    typer.echo(answer.text)
    note(f"{len(answer.tokens)} tokens in {seconds:.1f} s at level {level}")
