"""Which architectures work: a tiny model of every causal kind of the installed transformers, tried and trained.

    python benchmarks/architectures.py [KIND ...] [--write]

Each is built with random weights in a process of its own, with a limit of memory and time, and probed as a run would.
One that passes is trained for a step on its own samples, saved, and loaded by the library again, whose plain forward is
then compared with what engine and learner say of the trained policy. A kind is

- right: engine, learner and the saved model agree,
- refused: before anything starts, with the reason,
- not buildable: the settings below make no small model of it that the library itself can run,
- wrong, or crashing: it should have been refused. Then the exit status is 1.

`--write` writes the table of docs/models.md. All kinds take about two minutes on two cores.
"""

import argparse
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # forked children may not share the threads of a parent

import numpy as np
import peft  # noqa: F401  (once, for all children)
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rl_llm.config import PolicyConfig
from rl_llm.errors import UserError
from rl_llm.policies import CausalLM, PackedRow, SamplingParams
from rl_llm.policies.probe import LIMIT, probe

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
BYTES, SECONDS, PARAMETERS = 8 * 2**30, 60, 30e6
VOCABULARY = 256
WIDTH = 90
RIGHT, REFUSED, UNBUILDABLE, WRONG, CRASHED = "right", "refused", "not buildable", "wrong", "crashing"

# What a size becomes, by the name it has in settings, where it is larger than this.
SIZES = {
    32: """hidden_size n_embd d_model dim_model embedding_size emb_dim embedding_dim word_embed_proj_dim lru_width
        input_embedding_size attention_hidden_size backbone_hidden_size output_embedding_size mamba_d_ssm d_inner
        ple_embed_dim router_hidden_size""",
    48: """intermediate_size moe_intermediate_size ffn_dim n_inner dff dim_ff decoder_ffn_dim encoder_ffn_dim
        ffn_hidden_size shared_expert_intermediate_size moe_shared_expert_intermediate_size intermediate_size_mlp
        shared_intermediate_size expert_ffn_hidden_size feed_forward_size dense_intermediate_size""",
    2: """num_key_value_heads num_kv_heads multi_query_group_num num_query_groups swa_num_key_value_heads mamba_n_groups
        n_groups num_experts_per_tok moe_topk""",
    4: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers
        num_decoder_layers num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads attention_heads num_encoder_attention_heads num_decoder_attention_heads num_experts
        n_routed_experts num_local_experts moe_num_experts linear_num_key_heads linear_num_value_heads linear_num_heads
        swa_num_attention_heads mamba_n_heads mamba_num_heads num_blocks index_n_heads""",
    8: """head_dim dim_head kv_channels v_head_dim qk_rope_head_dim qk_nope_head_dim attention_head_dim
        linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim rotary_dim index_head_dim d_head
        mamba_d_state mamba_d_head mamba_head_dim mamba_headdim ssm_state_size state_size mamba_dt_rank time_step_rank
        attention_head_size hidden_size_per_layer_input laurel_rank adapter_rank""",
    24: "sliding_window attention_chunk_size window_size local_attention attention_window_size sliding_window_size",
    16: "index_topk q_lora_rank kv_lora_rank o_lora_rank qk_head_dim query_pre_attn_scalar image_size",
    256: "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size n_positions n_ctx",
    512: "max_position_embeddings max_seq_len model_max_length context_length max_target_positions",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
# What some kinds need besides.
HYBRID = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
GROUPED_EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
LATENT = {**GROUPED_EXPERTS, "num_key_value_heads": 4, "head_dim": 8}
MORE: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "axk1": LATENT,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {**GROUPED_EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": 48},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_key_value_heads": 4},
    "lfm2": HYBRID,
    "lfm2_moe": {**HYBRID, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "xmod": {"default_language": "en_XX"},
}


# Attempts at a kind: some want a number where others want none, and as many keys as queries.
ATTEMPTS: tuple[dict[str, int], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 8},
    {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4},
)


def small(settings: PreTrainedConfig, attempt: dict[str, int]) -> dict[str, Any]:
    """What makes all sizes of a kind's own settings small."""
    changed: dict[str, Any] = {name: value for name, value in attempt.items() if hasattr(settings, name)}
    for name, value in vars(settings).items():
        if isinstance(value, PreTrainedConfig):
            changed[name] = small(value, attempt)
        elif name.endswith(("token_id", "token_index", "token_idx")) and value is not None:
            ids = [min(token, VOCABULARY - 1) for token in np.atleast_1d(value).tolist()]
            changed[name] = ids if isinstance(value, list) else ids[0]
        elif isinstance(value, int) and not isinstance(value, bool) and name in SMALL and name not in changed:
            changed[name] = min(value, SMALL[name])
    if hasattr(settings, "is_decoder"):
        changed["is_decoder"] = True
    return changed


def build(kind: str, folder: Path) -> None:
    """A model as `make` makes it. Raises what the last attempt at it did."""
    for attempt in ATTEMPTS:
        try:
            return make(kind, folder, attempt)
        except Exception as error:
            last = error
    raise last


def make(kind: str, folder: Path, attempt: dict[str, int]) -> None:
    """A model with random weights so large that what is done to them is seen in the logits."""
    own = CONFIG_MAPPING[kind]
    settings = own(**{**small(own(), attempt), **MORE.get(kind, {})})
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(settings).num_parameters()
    if count > PARAMETERS:
        raise ValueError(f"it still has {count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings)
    for p in model.parameters():
        with torch.no_grad():
            p += torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.1)
    model.eval()(input_ids=torch.tensor([[5, 9, 11, 7]]))
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<end>": VOCABULARY - 2, "<pad>": VOCABULARY - 1}
    words_model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    words_model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_model, eos_token="<end>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)


def try_out(kind: str, folder: Path) -> tuple[str, str]:
    """What comes of a kind, and the figure or the reason."""
    try:
        build(kind, folder)
    except Exception as error:
        return UNBUILDABLE, f"{type(error).__name__}: {error}".splitlines()[0]
    config = PolicyConfig(precision="fp32", dropout=0.0)
    try:
        probe(CausalLM, str(folder), config, 0)
        policy = CausalLM(folder, config)
    except UserError as error:
        return REFUSED, str(error)
    off = max(trained(policy, folder / "trained"))
    return (RIGHT if off <= LIMIT else WRONG), f"{off:.1g} nats"


def trained(policy: CausalLM, folder: Path) -> tuple[float, float]:
    """How far engine and learner are from the saved model after a step: the largest differences in nats."""
    generator = np.random.default_rng(1)
    try:
        policy.check_length(46)
        longest = 40
    except UserError:  # it has a window
        longest = 12
    prompts = [generator.integers(0, VOCABULARY - 2, length) for length in (7, 2, longest)]
    params = SamplingParams(3, 1.0, 1.0, 0, 6, 0, (), seed=1)
    optimizer = torch.optim.SGD(policy.trainable.values(), lr=0.05)
    for learning in (True, False):
        acted = policy.sample(prompts, np.arange(9), params)
        rows = [
            PackedRow(tuple(range(a, a + 3)), p, tuple(acted.ids[a : a + 3]))
            for a, p in zip((0, 3, 6), prompts, strict=True)
        ]
        batch = policy.pack(rows)
        if learning:
            with policy.training(0.0):
                (policy.forward(batch, 1.0).logprobs.mean()).backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.trainable.values(), 1.0)
            if not 0 < norm < float("inf"):
                return float("nan"), float("nan")
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        learner = policy.forward(batch, 1.0).logprobs.numpy()
    policy.save_pretrained(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    off = np.zeros(2)
    for at, row in enumerate(batch.rows.tolist()):
        prompt, own = prompts[row // 3], acted.ids[row]
        ids = torch.from_numpy(np.concatenate([prompt, own])).long()[None]
        with torch.no_grad():
            logp = saved(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(dim=1)
        truth = logp.gather(1, ids[0, len(prompt) :, None]).squeeze(1).numpy()
        both = acted.logprobs[row], learner[at, : len(own)]
        off = np.maximum(off, [np.abs(found - truth).max() for found in both])
    return float(off[0]), float(off[1])


def child(kind: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.alarm(SECONDS)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = try_out(kind, Path(folder))
        except BaseException:
            found = CRASHED, traceback.format_exc()
    pipe.send(found)
    os._exit(0)


def of(kind: str) -> tuple[str, str]:
    """What comes of a kind, in a process of its own."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(kind, there))
    process.start()
    there.close()
    try:
        found: tuple[str, str] = here.recv()
    except EOFError:
        process.join()
        found = CRASHED, f"ended with exit code {process.exitcode}"
    process.join()
    return found


def reason(kind: str, what: str) -> str:
    """A refusal or an error as a cell of the table."""
    for pattern, short in (
        (r"^policy\.model: \S+ cannot be used:? ?|; docs/models\.md says which models can$", ""),
        (r"^policy\.model: the architecture \S+ (attends in a way of its own).*", r"\1"),
        (r"what it samples with and what it learns from are (\S+) and (\S+) nats .*", r"\1 and \2 nats off"),
        (r"^\((.*)\)$", r"\1"),
        (r"'?/tmp/\S+'?", kind),
        (r"[`|<>]", ""),
    ):
        what = re.sub(pattern, short, what)
    return what if len(what) <= WIDTH else what[:WIDTH].rsplit(" ", 1)[0] + " ..."


def write(results: dict[str, tuple[str, str]]) -> None:
    text, mark = DOCUMENT.read_text(), f"<!-- {Path(__file__).name} -->\n"
    rows = [f"| `{kind}` | {outcome} | {reason(kind, what)} |" for kind, (outcome, what) in results.items()]
    head = f"transformers {transformers.__version__}: {counts(results)}.\n\n| kind | | |\n|---|---|---|\n"
    DOCUMENT.write_text(text.partition(mark)[0] + mark + head + "\n".join(rows) + "\n")


def counts(results: dict[str, tuple[str, str]]) -> str:
    """How many kinds came to what."""
    found = [outcome for outcome, _ in results.values()]
    return ", ".join(f"{found.count(name)} {name}" for name in (RIGHT, REFUSED, UNBUILDABLE, WRONG, CRASHED))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--write", action="store_true", help="write the table of docs/models.md")
    arguments = parser.parse_args()
    kinds = arguments.kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    results = {}
    with ThreadPoolExecutor(2) as threads:
        for kind, found in zip(kinds, threads.map(of, kinds), strict=True):
            results[kind] = found
            print(f"{kind:28} {found[0]:14} {found[1]}", flush=True)
    print(counts(results))
    if arguments.write:
        write(results)
    return int(any(outcome in (WRONG, CRASHED) for outcome, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
