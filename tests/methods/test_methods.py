"""Which weights move, in which type they are kept, and in which they compute."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import LTXPipeline
from safetensors.torch import load_file
from transformers import T5EncoderModel

from finetrainers.config.schema import ModelConfig
from finetrainers.engines.single import SingleEngine
from finetrainers.errors import UserError
from finetrainers.families.find import find_family
from finetrainers.families.ltx import LTXVideo
from finetrainers.folder import LORA_FILE
from finetrainers.methods.find import find_method
from finetrainers.objectives import Noised
from finetrainers.training.saving import gather_weights
from finetrainers.weights import load_text_encoder_lora, read_notes, write_card
from tests.families.parity import rates
from tests.families.tiny import TINY
from tests.training.tiny_run import OBJECTIVE, full, lora, make_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = TINY["ltx-0.9.0"].write(tmp_path_factory.mktemp("model"))
    return find_family(ModelConfig(path=str(folder)))


def attached(family, options, dtype):
    """The method, its models, and what moves."""
    method = find_method(options, family, OBJECTIVE, dtype=dtype)
    models = method.load(CPU)
    method.attach(models, seed=1)
    return method, models, method.trained(models)


def named_parameters(models):
    return {f"{part}.{name}": value for part, model in models.items() for name, value in model.named_parameters()}


def save(method, models, folder):
    method.save(models, gather_weights(SingleEngine(), method, models), folder)


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_moves_adapters_alone_and_keeps_them_in_fp32(family, dtype):
    method, models, trained = attached(family, lora(), dtype)
    assert models.keys() == {"transformer"}
    assert len(trained) == 2 * 2 * 4 * 2, "two blocks, two attentions, four projections, A and B"
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(name.startswith("transformer.transformer_blocks.") for name in trained)
    assert {p.dtype for name, p in named_parameters(models).items() if name not in trained} == {dtype}
    assert not any(p.requires_grad for name, p in named_parameters(models).items() if name not in trained)
    method.loss(models, make_batch([0, 1])).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_moves_everything_in_fp32(family, dtype):
    method, models, trained = attached(family, full(), dtype)
    assert trained.keys() == named_parameters(models).keys() and all(
        name.startswith("transformer.") for name in trained
    )
    assert {p.dtype for p in trained.values()} == {torch.float32}
    loss = method.loss(models, make_batch([0, 1]))
    assert loss.shape == (2,) and loss.dtype == torch.float32
    loss.sum().backward()
    assert all(p.grad is not None for p in trained.values())


def test_adapters_compute_in_the_type_of_the_activations(family):
    """fp32 adapters on a bf16 base must not turn the activations kept for the backward pass into fp32."""
    _, models, _ = attached(family, lora(), torch.bfloat16)
    seen = set()
    for name, module in models["transformer"].named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_hook(lambda _, given, answer: seen.add((given[0].dtype, answer.dtype)))
    text = make_batch([0]).text
    noisy, timestep = torch.randn(1, 8, 2, 2, 3), torch.tensor([500.0])
    family.predict(models, noisy, timestep, text=text, given={}, fps_B=rates(25.0))
    assert seen == {(torch.bfloat16, torch.bfloat16)}


def test_fp32_adapters_keep_no_more_activations_than_bf16_ones(family):
    """Bytes kept for the backward pass, counted; peft's own way with fp32 adapters keeps clearly more."""

    def kept(make_like_peft):
        from peft import LoraConfig

        if make_like_peft:
            method = find_method(lora(rank=4), family, OBJECTIVE, dtype=torch.bfloat16)
            models = method.load(CPU)
            transformer = models["transformer"].requires_grad_(False)
            config = LoraConfig(r=4, lora_alpha=4, target_modules=r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)")
            transformer.add_adapter(config)
            for parameter in transformer.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        else:
            method, models, _ = attached(family, lora(rank=4), torch.bfloat16)
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = method.loss(models, make_batch(range(8))).sum()
        own = {p.untyped_storage().data_ptr() for p in models["transformer"].parameters()}
        del loss
        return sum(size for pointer, size in storages.items() if pointer not in own)

    assert kept(False) < 0.9 * kept(True)


def test_the_scale_is_alpha_over_rank_and_defaults_to_one(family):
    for alpha, scale in [(None, 1.0), (8, 2.0), (1, 0.25)]:
        _, models, _ = attached(family, lora(rank=4, alpha=alpha), torch.float32)
        scales = {s for m in models["transformer"].modules() if hasattr(m, "scaling") for s in m.scaling.values()}
        assert scales == {scale}


def test_the_seed_fixes_the_adapters_and_nothing_else_is_drawn(family):
    first = attached(family, lora(), torch.float32)[2]
    method = find_method(lora(), family, OBJECTIVE, dtype=torch.float32)
    models = method.load(CPU)
    state = torch.get_rng_state()
    method.attach(models, seed=1)
    second = method.trained(models)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(p.abs().max() > 0 for name, p in first.items() if "lora_A" in name)
    assert all(p.abs().max() == 0 for name, p in first.items() if "lora_B" in name), "starts as the base model"


TARGETS = [
    (["to_q"], 4),
    (["attn1.to_q", "ff.net.2"], 4),
    (r"transformer_blocks\.0\..*to_k", 2),
    ("proj_out", 1),
]


@pytest.mark.parametrize(("targets", "count"), TARGETS)
def test_targets_by_name_or_by_expression(family, targets, count):
    _, _, trained = attached(family, lora(target_modules=targets), torch.float32)
    assert len(trained) == 2 * count


@pytest.mark.parametrize(("targets", "said"), [(["q_proj"], "matches no linear layer"), ("(", "regular expression")])
def test_targets_that_match_nothing_are_refused(family, targets, said):
    with pytest.raises(UserError, match=said):
        attached(family, lora(target_modules=targets), torch.float32)


def stub_loss(batch, *, prediction, weight_B=None):
    """The loss for a given answer of the transformer, with the batch's own latents and noise."""
    target = batch.noise_BCFHW - batch.latents_BCFHW
    noised = Noised(batch.latents_BCFHW, batch.level_B, target, weight_B)
    objective = SimpleNamespace(noise=lambda *given: noised)
    family = SimpleNamespace(predict=lambda *given, **more: prediction)
    return find_method(lora(), family, objective, dtype=torch.float32).loss({}, batch), target


GIVEN = {"the first": [[1, 0], [1, 0]], "another of each": [[1, 0], [0, 1]], "of one sample": [[0, 0], [0, 1]]}


@pytest.mark.parametrize("case", GIVEN)
def test_given_frames_are_not_learned(case):
    """The mean is over the other frames alone, and nothing pulls at what is answered for the given ones."""
    marked = torch.tensor(GIVEN[case], dtype=torch.bool)
    batch = replace(make_batch([0, 1]), given={"frames": marked})
    prediction = torch.randn(batch.latents_BCFHW.shape, generator=torch.Generator().manual_seed(4)).requires_grad_()
    loss, target = stub_loss(batch, prediction=prediction)
    for row in range(2):
        errors = [
            (prediction[row, channel, frame, height, width] - target[row, channel, frame, height, width]).item() ** 2
            for channel in range(8)
            for frame in range(2)
            for height in range(2)
            for width in range(3)
            if not marked[row, frame]
        ]
        assert loss[row].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    loss.sum().backward()
    for row in range(2):
        for frame in range(2):
            assert (prediction.grad[row, :, frame].abs().max() == 0) == bool(marked[row, frame])


def test_the_transformer_sees_what_is_given(family):
    """A given frame reaches the answer: the same batch without it has another loss."""
    method, models, _ = attached(family, lora(), torch.float32)
    batch = make_batch([0, 1])
    frames = torch.tensor([[True, False]] * 2)
    plain, given = batch, replace(batch, given={"frames": frames, "latents": batch.latents_BCFHW})
    other = replace(given, given={"frames": frames, "latents": batch.latents_BCFHW + 1})
    with torch.no_grad():
        losses = [method.loss(models, each) for each in (plain, given, other)]
    assert not torch.allclose(losses[0], losses[1]) and not torch.allclose(losses[1], losses[2])


def test_each_sample_has_its_own_weight():
    batch = make_batch([0, 1, 2])
    prediction = torch.zeros_like(batch.latents_BCFHW)
    plain, target = stub_loss(batch, prediction=prediction)
    assert plain.tolist() == pytest.approx([target[row].square().mean().item() for row in range(3)], rel=1e-5)
    weight_B = torch.tensor([0.0, 0.5, 2.0])
    weighted, _ = stub_loss(batch, prediction=prediction, weight_B=weight_B)
    assert weighted.tolist() == pytest.approx((plain * weight_B).tolist(), rel=1e-6)
    marked = replace(batch, given={"frames": torch.tensor([[True, False]] * 3)})
    both, _ = stub_loss(marked, prediction=prediction, weight_B=weight_B)
    alone, _ = stub_loss(marked, prediction=prediction)
    assert both.tolist() == pytest.approx((alone * weight_B).tolist(), rel=1e-6)


def tokens_of(family, captions):
    return family.tokenize(family.load_tokenizers(), captions)


CAPTIONS = ["a red circle", "two blue squares, slowly"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_text_encoder_learns_too(family, dtype):
    """Gradients reach the adapters of both, which are kept in fp32; neither base moves."""
    method, models, trained = attached(family, lora(text_encoder="lora"), dtype)
    assert method.trains_text_encoder and models.keys() == {"transformer", "text_encoder"}
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    method.loss(models, replace(make_batch([0, 1]), text=tokens_of(family, CAPTIONS))).sum().backward()
    by_part = {part: [p for name, p in trained.items() if name.startswith(f"{part}.")] for part in models}
    assert len(by_part["text_encoder"]) == 2 * 4 * 2, "two blocks, four projections, A and B"
    assert len(trained) == sum(map(len, by_part.values()))
    for parameters in by_part.values():
        assert all(p.dtype == torch.float32 and p.grad.abs().max() > 0 for p in parameters)
    assert all(p.grad is None for name, p in named_parameters(models).items() if name not in trained)
    assert not models["text_encoder"].training, "its own dropout stays off"


def trained_pair(family, folder):
    """What a run with text encoder would leave: adapters that move both, saved."""
    method, models, trained = attached(family, lora(text_encoder="lora", alpha=8), torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save(method, models, folder)
    return method, models


def embedded(family, encoder):
    with torch.no_grad():
        return family.embed({"text_encoder": encoder}, tokens_of(family, CAPTIONS))["prompt_embeds"]


@pytest.mark.filterwarnings("error:Could not find a config file")
def test_a_trained_text_encoder_comes_back(family, tmp_path):
    _, models = trained_pair(family, tmp_path)
    file = tmp_path / LORA_FILE
    assert {name.split(".")[0] for name in load_file(file)} == {"transformer", "text_encoder"}
    fresh = T5EncoderModel.from_pretrained(family.folder, subfolder="text_encoder")
    base, expected = embedded(family, fresh), embedded(family, models["text_encoder"])
    assert not torch.allclose(base, expected, atol=1e-2)
    halfway = []
    for scale in (1.0, 0.0, 0.5):
        encoder = T5EncoderModel.from_pretrained(family.folder, subfolder="text_encoder")
        load_text_encoder_lora(encoder, file, scale=scale)
        halfway.append(embedded(family, encoder))
        scales = {s for module in encoder.modules() if hasattr(module, "lora_A") for s in module.scaling.values()}
        assert scales == {scale * 8 / 4}
    torch.testing.assert_close(halfway[0], expected)
    torch.testing.assert_close(halfway[1], base)
    assert not torch.allclose(halfway[2], base, atol=1e-2) and not torch.allclose(halfway[2], expected, atol=1e-2)


def test_the_card_of_a_trained_text_encoder_can_be_run(family, tmp_path):
    """Its very lines: the pipeline that they leave embeds and predicts as the trained models do."""
    method, models = trained_pair(family, tmp_path)
    facts = {"base_model": str(family.folder), "family": "ltx", "task": "text-to-video", "method": "lora"}
    write_card(tmp_path, **facts, step=1, trigger="")
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(tmp_path)), names)
    pipeline = names["pipeline"]
    assert isinstance(pipeline, LTXPipeline)
    torch.testing.assert_close(embedded(family, pipeline.text_encoder), embedded(family, models["text_encoder"]))
    batch = replace(make_batch([0, 1]), text=tokens_of(family, CAPTIONS))
    loaded = {"transformer": pipeline.transformer.eval(), "text_encoder": pipeline.text_encoder}
    with torch.no_grad():
        ours, theirs, base = (method.loss(each, batch) for each in (models, loaded, method.load(CPU)))
    torch.testing.assert_close(theirs, ours)
    assert not torch.allclose(base, ours, rtol=1e-3)


def test_a_file_without_a_text_encoder_leaves_it_alone(family, tmp_path):
    method, models, _ = attached(family, lora(), torch.float32)
    save(method, models, tmp_path)
    encoder = T5EncoderModel.from_pretrained(family.folder, subfolder="text_encoder")
    load_text_encoder_lora(encoder, tmp_path / LORA_FILE, scale=1.0)
    assert not any("lora" in name for name, _ in encoder.named_parameters())
    assert not method.trains_text_encoder and "text_encoder" not in method.load(CPU)


@pytest.mark.parametrize("options", [lora(), full()], ids=["lora", "full"])
def test_weights_say_what_they_were_trained_with(family, tmp_path, options):
    rope = {"method": "interpolate", "frames": 513}
    stretched = find_family(ModelConfig(path=str(family.folder), rope_temporal=rope))
    for number, (each, notes) in enumerate([(family, {}), (stretched, {"rope_temporal": rope})]):
        method, models, _ = attached(each, options, torch.float32)
        folder = tmp_path / str(number)
        folder.mkdir()
        save(method, models, folder)
        assert read_notes(folder / ("transformer" if options.name == "full" else LORA_FILE)) == notes


class TwoExperts(LTXVideo):
    """Two transformers that share the noise levels."""

    def load_transformers(self, dtype):
        pair = [LTXVideo.load_transformers(self, dtype)["transformer"] for _ in range(2)]
        return dict(zip(("transformer", "transformer_2"), pair, strict=True))

    def predict(self, transformers, latents_BCFHW, timestep_B, **given):
        expert = "transformer" if timestep_B.min() >= 500 else "transformer_2"
        return super().predict({"transformer": transformers[expert]}, latents_BCFHW, timestep_B, **given)


@pytest.mark.parametrize("options", [lora(), full()], ids=["lora", "full"])
def test_two_transformers_are_trained_and_saved_side_by_side(family, tmp_path, options):
    """Each learns from its own noise levels, and lies where diffusers looks for it."""
    experts = TwoExperts(family.folder, family.options)
    method, models, trained = attached(experts, options, torch.float32)
    parts = ("transformer", "transformer_2")
    assert {name.split(".")[0] for name in trained} == set(parts) and len(trained) % 2 == 0
    for level, expert in ((0.9, "transformer"), (0.1, "transformer_2")):
        method.loss(models, replace(make_batch([0]), level_B=torch.tensor([level]))).sum().backward()
        assert {name.split(".")[0] for name, p in trained.items() if p.grad is not None} == {expert}
        for parameter in trained.values():
            parameter.grad = None
    with torch.no_grad():
        for number, parameter in enumerate(trained.values()):
            parameter.fill_(0.01 * number)
    save(method, models, tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    if options.name == "full":
        weights = "diffusion_pytorch_model.safetensors"
        assert files == {f"{part}/{name}" for part in parts for name in ("config.json", weights)}
        found = {part: load_file(tmp_path / part / weights) for part in parts}
        assert all(torch.equal(found[part][n], p) for part in parts for n, p in models[part].named_parameters())
        return
    assert files == {LORA_FILE, f"transformer_2/{LORA_FILE}"}
    first, second = (load_file(tmp_path / folder / LORA_FILE) for folder in (".", "transformer_2"))
    assert first.keys() == second.keys() and all(name.startswith("transformer.") for name in first)
    for part, found in zip(parts, (first, second), strict=True):
        expected = {n.replace(".default.", "."): p for n, p in trained.items() if n.startswith(f"{part}.")}
        named = {name.replace("transformer.", f"{part}.", 1): tensor for name, tensor in found.items()}
        assert named.keys() == expected.keys() and all(torch.equal(named[name], expected[name]) for name in named)
