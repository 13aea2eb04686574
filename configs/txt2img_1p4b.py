"""Text to image at 256² on KL latents, f=8: the paper's 1.45 B parameters (Tab. 2).

Command   python train.py --config=configs/txt2img_1p4b.py --workdir=runs/txt2img_1p4b
          --config.data.dir=IMAGES_WITH_CAPTIONS --config.first_stage.path=WORKDIR_OF_kl_f8
          --config.tokenizer.path=VOCAB_OF_BERT_BASE_UNCASED
Cost      872.30 M parameters and 542.89 M of text transformer; 390,000 batches of 680 (LAION-400M)
Expected  FID 12.63, IS 30.3 on MS-COCO (250 steps, guidance 1.5); 23.31, 20.0 without guidance
"""

from ml_collections import ConfigDict

from configs import default, kl_f8, text2img256


def get_config() -> ConfigDict:
    c = default.paper_denoiser(kl_f8, batch_size=680, num_steps=390_000)
    text2img256.captions(c, width=1280)
    c.unet.remat = "full"
    c.diffusion.update({"beta_start": 0.00085, "beta_end": 0.012})
    c.sampling.update({"num_steps": 250, "guidance_scale": 1.5})
    return c
