"""What `fastlora serve` starts: a base and a folder of adapters, the engine that answers with them, and a socket on this machine's loopback."""

import copy
import gc
import importlib.util
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model

from fastlora import adapters as adapter_files
from fastlora.bank import METHODS, AdapterBank
from fastlora.generation import end_tokens
from fastlora.layers import BASE
from fastlora.models import load_model, positions, require_decoder
from fastlora.peft import silent
from fastlora.serving.adapters import Adapters
from fastlora.serving.engine import THREAD, Engine

LOOPBACK = "127.0.0.1"
DEFAULT_LENGTH = 2048
OWN = "fastlora-server"
"""Of the adapter that a model has before its first one is read."""

SERVED = tuple(name for name in METHODS if name != "MULTITASK_PROMPT_TUNING")
"""The methods whose rows can share a batch, all of one folder's of the same; a prompt of several tasks has none of its own for a request."""

LINGERING = 120  # seconds that answers under way get to end, once the server is told to


def require_web() -> None:
    """Raise ImportError, which says what to type, where the web framework is not installed."""
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"it needs {' and '.join(missing)}: pip install 'fastlora-kernels[serve]'")


def load_engine(
    model: str,
    adapters: str | Path | None = None,
    *,
    dtype: str = "auto",
    max_rows: int = 32,
    max_length: int | None = None,
    max_queue: int = 64,
    max_adapter_bytes: int | None = None,
    allow_missing: bool = False,
    allow_noop: bool = False,
) -> Engine:
    """The engine of a base and the adapters in a folder, accelerated; it is not started. They are of one method, one of SERVED: plain LoRA, rsLoRA,
    DoRA and such with biases of B (`lora_bias`) together, or IA³, or one kind of soft prompts.

    Args:
        model: the base: a folder, whose own name it is asked for by, or a hub id, which is its name.
        adapters: a folder with an adapter's in each of its folders, which name them; None: the base alone.
        dtype: the base's, as `load_model` takes it.
        max_rows: answers under way at once.
        max_length: tokens of a prompt and its answer; None: the model's positions, at most DEFAULT_LENGTH.
        max_queue: requests that may wait.
        max_adapter_bytes: what adapters may take in memory: each is read when somebody asks for it, and leaves when there is no room for another
            (`fastlora.AdapterBank`). None: all are read now, and stay.
        allow_missing, allow_noop: as `load_model`'s.

    Raises:
        ValueError: a bad option, an adapter that a mixed batch cannot have, the base's name is an adapter's, too, a model that cannot be served.
        OSError, AdapterError: as `load_model`.
    """
    import fastlora

    if allow_missing and max_adapter_bytes is not None:
        raise ValueError("allow_missing=True: expected no max_adapter_bytes, a bank takes whole adapters only")
    require_decoder(model, "serve")
    base = Path(model).resolve().name if Path(model).is_dir() else model
    folders = {} if adapters is None else adapter_files.folders_in(adapters, "adapters")
    for name in (base, BASE):
        if name in folders:
            raise ValueError(f"adapters={folders[name]}: its name is the base model's: rename one of the folders")
    configs = [adapter_files.read_config(folder / adapter_files.CONFIG) for folder in folders.values()]
    by_folder = dict(zip(folders.values(), configs, strict=True))
    for folder, config in by_folder.items():
        _require_mixable(folder, config, by_folder)
    # PEFT's names have no dots, and none that torch's modules have.
    inner = {name: f"adapter-{i}" for i, name in enumerate(folders)}
    paths = {inner[name]: folder for name, folder in folders.items()}
    now = paths if max_adapter_bytes is None else {}
    loaded, tokenizer = load_model(
        model, now, dtype=dtype, accelerate=False, allow_missing=allow_missing, allow_noop=allow_noop
    )
    bank = None
    if configs and max_adapter_bytes is not None:
        loaded, bank = _with_bank(loaded, paths, configs[0], max_adapter_bytes, allow_noop)
    fastlora.accelerate(loaded.requires_grad_(False), frozen=True, fuse=True)
    most = positions(loaded) or DEFAULT_LENGTH
    length = min(most, DEFAULT_LENGTH) if max_length is None else max_length
    if length > most:
        raise ValueError(f"max_length={length}: the model has positions for {most}")
    prompts = {
        name: one.num_virtual_tokens for name, one in zip(folders, configs, strict=True) if one.is_prompt_learning
    }
    names = Adapters(base, inner, loaded if inner else None, bank, prompts)
    by_row = [folder for folder, one in by_folder.items() if one.peft_type == "IA3" or getattr(one, "use_dora", False)]
    if by_row and not names.are_by_row:
        kind = "IA³" if by_folder[by_row[0]].peft_type == "IA3" else "a DoRA"
        raise ValueError(
            f"adapters={by_row[0]}: it is {kind}, which shares a batch only where every adapted module of all adapters is a fused linear layer"
        )
    own = loaded.get_base_model() if prompts else loaded
    return Engine(own, tokenizer, names, max_rows=max_rows, max_length=length, max_queue=max_queue)


def start_engine(*args: Any, **options: Any) -> Engine:
    """`load_engine`'s, at work: in the thread that has loaded it.

    GNU's OpenMP lets the helpers of a process's one computing thread wait awake. Those of several doze, and to wake them a hundred times costs a
    third of a step: so no other thread may compute, before or beside it.
    """
    loaded: Future[Engine] = Future()

    def load_and_run() -> None:
        try:
            engine = load_engine(*args, **options)
        except BaseException as error:  # raised where it was asked for
            loaded.set_exception(error)
            return
        engine.start(threading.current_thread())
        with _little_to_collect():
            loaded.set_result(engine)
            engine.run()

    threading.Thread(target=load_and_run, name=THREAD, daemon=True).start()
    return loaded.result()


@contextmanager
def _little_to_collect() -> Iterator[None]:
    """A context in which Python's collector leaves alone what is there now: the imports' half a million objects take it 0.4 s to look at, in
    which no row gets a token, and adapters that come and go make it look again and again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _with_bank(
    model: Any, folders: Mapping[str, Path], first: Any, budget_bytes: int, allow_noop: bool
) -> tuple[Any, AdapterBank]:
    """The model with the layers of all these adapters and none of them, and the bank that has their names."""
    # Of B zero, or as small as one of that method is; nobody asks for it.
    own: Any = copy.deepcopy(first)
    own.inference_mode = True
    if first.peft_type == "LORA":
        own = LoraConfig(r=1, target_modules=first.target_modules, task_type="CAUSAL_LM", inference_mode=True)
    elif first.is_prompt_learning:
        own.num_virtual_tokens = 1
    model = get_peft_model(model, own, adapter_name=OWN)
    silent.judged.setdefault(model, set()).add(OWN)
    bank = AdapterBank(model.eval(), budget_bytes=budget_bytes, allow_noop=allow_noop)
    for name, folder in folders.items():
        bank.register(name, folder)
    return model, bank


def _require_mixable(folder: Path, config: Any, by_folder: Mapping[Path, Any]) -> None:
    """Raise ValueError unless rows of this adapter can share a batch with the others'."""
    first, method = next(iter(by_folder)), config.peft_type.value
    problem = None
    if method not in SERVED:
        problem = f"it is of {method}, expected {', '.join(SERVED[:-1])} or {SERVED[-1]}: others share no batch"
    elif config.peft_type != by_folder[first].peft_type:
        problem = (
            f"it is of {method}, and {first} of {by_folder[first].peft_type.value}: a model has adapters of one method"
        )
    elif config.is_prompt_learning and config.task_type != "CAUSAL_LM":
        problem = f"task_type={config.task_type}: expected CAUSAL_LM of a soft prompt"
    elif getattr(config, "alora_invocation_tokens", None):
        problem = "it begins within a prompt (alora_invocation_tokens), and so shares no batch"
    if problem:
        raise ValueError(f"adapters={folder}: {problem}")
    adapter_files.require_an_untouched_base(adapter_files.Adapter(folder, config, {}, {}))


def serve(
    model: str,
    adapters: str | Path | None = None,
    *,
    port: int = 8000,
    max_body_bytes: int = 1 << 20,
    say: Callable[[str], None] = print,
    **options: Any,
) -> None:
    """Serve OpenAI's interface on the loopback until SIGTERM or Ctrl-C; then answers under way and waiting are ended first.

    Args:
        port: 0: any that is free.
        max_body_bytes: of a request.
        say: is told in a line where the server is and what can be asked for.
        options: as `load_engine` takes them, with model and adapters.

    Raises:
        ImportError: the web framework is not installed.
        OSError: the port is taken; and as `load_engine`.
    """
    require_web()
    import uvicorn

    from fastlora.serving.app import App

    try:
        listening = socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise OSError(f"port={port}: {error.strerror or error}") from error
    with listening:
        engine = start_engine(model, adapters, **options)
        app = App(engine, frozenset(end_tokens(engine.model, engine.tokenizer)), largest_body=max_body_bytes)
        config = uvicorn.Config(
            app, log_level="error", access_log=False, lifespan="on", timeout_graceful_shutdown=LINGERING
        )
        names = ", ".join(engine.adapters.names)
        say(f"http://{LOOPBACK}:{listening.getsockname()[1]}/v1 answers as {names}; Ctrl-C ends it")
        # uvicorn raises a signal again once it has ended: then nothing is left to do.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            signal.signal(signal.SIGTERM, before)
