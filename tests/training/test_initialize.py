import shutil

import pytest
import torch
from conftest import short_run, tiny_vae
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from training_runs import changed

from dit_hf import CosineLatentScheduler, LatentDiTPipeline, LatentDiTTransformer2DModel
from dit_hf.hub.convert import convert
from dit_hf.latents.prepare import prepare_latents
from dit_hf.training.objective import loss_weights, losses, training_target
from dit_hf.training.trainer import Trainer, train


@pytest.fixture(scope="module")
def earlier(training_latents, tmp_path_factory):
    """A run that learned two conditions, in an order that is not the cache's. Not to be written to."""
    config = short_run(training_latents, tmp_path_factory.mktemp("earlier"))
    return train(changed(config, data={"conditions": ["Smiling", "Eyeglasses"]}, train={"max_train_steps": 4}))


def test_a_run_starts_with_the_weights_and_normalization_of_an_earlier_one(config, earlier):
    config = changed(config, data={"conditions": ["Smiling", "Eyeglasses"]})
    for name in (earlier, earlier / "pipeline"):
        trainer = Trainer(changed(config, model={"init_from": str(name)}))
        pipeline = DiffusionPipeline.from_pretrained(earlier / "pipeline")
        weights = trainer.transformer.state_dict()
        for key, value in pipeline.transformer.state_dict().items():
            assert torch.equal(weights[key], value), key
        assert trainer.normalization == (pipeline.config.latents_mean, pipeline.config.latents_std)


def test_with_new_conditions_those_of_the_earlier_model_keep_their_meaning(config, earlier):
    before = DiffusionPipeline.from_pretrained(earlier / "pipeline").transformer.eval()
    trainer = Trainer(changed(config, model={"init_from": str(earlier)}))
    after, names = trainer.transformer.eval(), list(trainer.reader.conditions)
    assert len(names) == 22
    noisy, timesteps = torch.randn(4, 4, 8, 8), torch.tensor([1, 100, 300, 499])
    condition_ids = torch.tensor([[0, 1], [1, 0], [2, 1], [2, 2]])
    ids = torch.full((4, 22), 2)  # new conditions are null; and null is not zero: it has a row of its own
    ids[:, names.index("Smiling")], ids[:, names.index("Eyeglasses")] = condition_ids.T
    fresh = [n for n in names if n not in ("Smiling", "Eyeglasses")]
    rows = [int(after.condition_offsets[names.index(name)]) + 2 for name in fresh]
    with torch.no_grad():
        after.condition_embedding.weight[rows] = 0
        expected = before(noisy, timesteps, condition_ids).sample
        assert torch.allclose(after(noisy, timesteps, ids).sample, expected, atol=1e-5)


def test_at_another_resolution_positions_are_stretched(config, earlier, vae_folder, tmp_path):
    folder = tmp_path / "larger"
    prepare_latents("avatars", str(folder), str(vae_folder), "32", flip=True, num_images=40)
    config = changed(config, data={"latents": str(folder)}, model={"init_from": str(earlier)})
    run = train(changed(config, data={"conditions": ["Smiling", "Eyeglasses"]}))
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert (pipeline.transformer.config.sample_size, pipeline.transformer.config.position_base_size) == (16, 8)
    assert pipeline({"Smiling": True}, num_inference_steps=2).images[0].size == (32, 32)
    assert f"initialized from | {earlier.name}" in (run / "README.md").read_text()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"prediction_type": "sample"}}, "prediction_type is sample, but .* predicts v_prediction"),
        ({"model": {"num_layers": 3}}, "does not fit: num_layers is 2 there and 3 here"),
        (
            {"objective": {"num_train_timesteps": 100}},
            "500 noise levels of its own, .* not the 100 .*; give --objective.num_train_timesteps 500 --obj",
        ),
        ({"model": {"qk_norm": "rms_norm"}}, "qk_norm is None there and 'rms_norm' here"),
        ({"model": {"init_from": "nowhere"}}, "model.init_from nowhere: no such folder"),
    ],
)
def test_an_earlier_model_that_does_not_fit_is_refused_with_the_difference(config, earlier, sections, message):
    sections = {**sections, "model": {"init_from": str(earlier), **sections.get("model", {})}}
    with pytest.raises(ValueError, match=message):
        Trainer(changed(config, **sections))


def test_another_schedule_is_refused_and_another_vae_is_reported(config, tmp_path, capsys):
    """As converted pipelines, or those of other tools, may have them."""
    config = changed(config, model={"preset": "tiny", "init_from": str(tmp_path / "other")})
    sizes = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12}
    levels = CosineLatentScheduler(prediction_type="v_prediction")
    betas = torch.linspace(1e-4, 0.02, 500).tolist()
    linear = CosineLatentScheduler(500, prediction_type="v_prediction", trained_betas=betas)
    refused = ((4, linear, r"noise levels of its own.*beta_schedule\)$"), (6, levels, "out_channels is 6 there and 4"))
    for channels, scheduler, message in refused:
        transformer = LatentDiTTransformer2DModel(**sizes, out_channels=channels)
        LatentDiTPipeline(transformer, scheduler, tiny_vae()).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=message):
            Trainer(config)
    torch.manual_seed(1)
    other_vae = AutoencoderKL.from_config(tiny_vae().config)
    LatentDiTPipeline(LatentDiTTransformer2DModel(**sizes), levels, other_vae).save_pretrained(tmp_path / "other")
    Trainer(config)
    assert "has another VAE than these latents; this run takes theirs" in capsys.readouterr().out


def test_a_model_whose_conditions_are_dropped_predicts_the_same_without_conditions(config, earlier):
    before = DiffusionPipeline.from_pretrained(earlier / "pipeline").transformer.eval()
    config = changed(config, data={"conditions": []}, model={"init_from": str(earlier)})
    after = Trainer(config).transformer.eval()
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([1, 400])
    assert after.condition_embedding is None
    with torch.no_grad():
        assert torch.allclose(after(noisy, timesteps).sample, before(noisy, timesteps).sample, atol=1e-5)


def imagenet_dit(width=384, heads=6, latent=32):
    """A diffusers DiT as facebook/DiT-XL-2-256, but of the width of DiT-S/2 and of two layers, with random weights."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=8, num_layers=2,
        sample_size=latent, patch_size=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        # Every block has the same embedders, as in the published weights.
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def test_a_published_dit_is_continued_with_its_own_objective(config, tmp_path):
    """The oracle is diffusers' model and scheduler: the squared error of the predicted noise, without the sigma."""
    theirs, levels = imagenet_dit(), DDPMScheduler(1000)
    DiTPipeline(theirs, tiny_vae(), levels).save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), str(tmp_path / "converted"))
    linear = {"prediction_type": "epsilon", "beta_schedule": "linear", "num_train_timesteps": 1000, "snr_gamma": None}
    published = {"preset": "S/2", "num_layers": 2, "num_attention_heads": None, "attention_head_dim": None}
    published["init_from"] = str(tmp_path / "converted")
    config = changed(config, model=published, objective={**linear, "condition_dropout": 0.5}, data={"conditions": []})
    trainer = Trainer(config)

    batch = trainer.config.train.global_batch_size
    clean, noise = torch.randn(batch, 4, 32, 32), torch.randn(batch, 4, 32, 32)
    timesteps = torch.randint(1000, (batch,))
    with torch.no_grad():
        noisy = levels.add_noise(clean, noise, timesteps)
        predicted = theirs(noisy, timesteps, torch.full((batch,), 1000)).sample[:, :4]
        expected = (predicted - noise).square().mean((1, 2, 3))
        scheduler = trainer.step.scheduler
        prediction = trainer.transformer.eval()(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        weights = loss_weights(scheduler, timesteps.float(), None)
        ours = losses(prediction, training_target(scheduler, clean, noise, timesteps.float()), weights, "l2")
    assert torch.allclose(ours, expected, rtol=1e-4)
    # Its run is finished and resumed like any other, and its pipeline predicts noise at those levels.
    trainer.config.train.max_train_steps = 1
    exported = DiffusionPipeline.from_pretrained(train(trainer.config) / "pipeline")
    assert exported.scheduler.config.prediction_type == "epsilon"
    assert torch.allclose(exported.scheduler.betas, levels.betas)
    assert exported.transformer.out_channels == 4


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"prediction_type": "epsilon"}, "objective.prediction_type epsilon needs model.init_from"),
        ({"beta_schedule": "linear", "num_train_timesteps": 1000}, "objective.beta_schedule linear needs model.init"),
    ],
)
def test_what_continues_other_models_does_not_begin_one(config, objective, message):
    with pytest.raises(ValueError, match=message):
        train(changed(config, objective=objective))


def test_the_model_that_a_run_started_from_need_not_exist_when_it_resumes(config, earlier, tmp_path):
    earlier = shutil.copytree(earlier, tmp_path / "earlier")
    config = changed(config, model={"init_from": str(earlier)}, train={"max_train_steps": 4})
    train(config)
    earlier.rename(tmp_path / "moved")
    run = train(changed(config, train={"max_train_steps": 8, "resume_from_checkpoint": "latest"}))
    assert (run / "checkpoint-8").is_dir()
    assert f"| initialized from | {earlier.name} |" in (run / "README.md").read_text()
    assert str(earlier.parent) not in (run / "README.md").read_text()
