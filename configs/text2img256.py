"""Text to image at 256² on VQ latents, f=4 (the Conceptual Captions model of the zoo).

Command   python train.py --config=configs/text2img256.py --workdir=runs/text2img256
          --config.data.dir=IMAGES_WITH_CAPTIONS --config.first_stage.path=WORKDIR_OF_vq_f4
          --config.tokenizer.path=VOCAB_OF_BERT_BASE_UNCASED
Cost      403.62 M parameters and 166.59 M of text transformer, batches of 28
Expected  FID 16.79, IS 13.89 on Conceptual Captions (100 steps, eta 0)
"""

from ml_collections import ConfigDict

from configs import default, vq_f4


def get_config() -> ConfigDict:
    c = default.paper_denoiser(vq_f4, batch_size=28, num_steps=1_000_000)
    captions(c, width=640)
    c.unet.update({"model_channels": 192, "channel_mult": (1, 2, 3, 5), "num_head_channels": 32})
    c.unet.attention_resolutions = (8, 4, 2)
    c.sampling.update({"num_steps": 100, "eta": 0.0})
    c.optimizer.learning_rate = 2e-6 * c.batch_size
    return c


def captions(c: ConfigDict, width: int) -> None:
    """Captions in BERT's word pieces, encoded by the paper's transformer of 32 layers."""
    c.tokenizer.update({"name": "bert", "max_length": 77})
    c.conditioners = ConfigDict(
        {"text": {"width": width, "depth": 32, "empty": (101, 102), "dtype": "bfloat16"}}
    )
