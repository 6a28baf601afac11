"""fastai's own callbacks, which ours stand beside."""

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import FetchPredsCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.callback.tracker import (
    EarlyStoppingCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
    TerminateOnNaNCallback,
)
from fastai.callback.training import GradientAccumulation, GradientClip

COMPANY = {
    "save": lambda folder: SaveModelCallback(with_opt=True),
    "save_all": lambda folder: SaveModelCallback(every_epoch=True),
    "stop": lambda folder: EarlyStoppingCallback(patience=9),
    "plateau": lambda folder: ReduceLROnPlateau(patience=1, min_delta=9.0),
    "nan": lambda folder: TerminateOnNaNCallback(),
    "mixup": lambda folder: MixUp(),
    "cutmix": lambda folder: CutMix(),
    "accumulate": lambda folder: GradientAccumulation(20),
    "clip": lambda folder: GradientClip(0.1),
    "tensorboard": lambda folder: TensorBoardCallback(folder / "board", log_preds=False),
    "progress": lambda folder: ProgressCallback(),
    "csv": lambda folder: CSVLogger(),  # behind it, for it does not pass lines on
    "fetch": lambda folder: FetchPredsCallback(),
    "fetch_train": lambda folder: FetchPredsCallback(ds_idx=0, with_decoded=True),
    "channels_last": lambda folder: ChannelsLast(),
}
HUGE = {"init_scale": 2.0**36, "growth_interval": 3}  # gradients overflow: steps are skipped


class OnCPU(MixedPrecision):
    """fastai's mixed precision asks for 'cuda'; the same with the CPU's autocast and scaler."""

    def before_fit(self):
        dtype = torch.bfloat16 if self.amp_mode.value == "bf16" else torch.float16
        self.autocast, self.scales = torch.autocast("cpu", dtype), []
        self.learn.scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, **HUGE)


class SmallScale(OnCPU):
    """Mixed precision on the CPU, whose gradients do not overflow."""

    def before_fit(self):
        self.autocast, self.scales = torch.autocast("cpu", torch.bfloat16), []
        self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
