import torch, json, pathlib, shutil; torch.set_num_threads(1)
from palate.models.gaussian import GaussianModel
from palate.algorithms.srpo import SRPO, SRPOSettings
from palate.train import train, steer
def mk(): return GaussianModel(torch.full((3,4,4),0.2), 0.6, trains=("velocity",))
def contrast(images, prompts): return images.std((1,2,3))
S=dict(positive=["3d"],negative=["flat"],rollout_steps=2)
shutil.rmtree("/tmp/rev/g",ignore_errors=True)
try: train(mk(), SRPO(SRPOSettings(**S)), contrast, ["a cat","a dog"], folder="/tmp/rev/g/a", steps=2, batch_size=2, progress=False); print("A ok")
except Exception as e: print("A", type(e).__name__, e)
def fussy(images, prompts):
    if any("glosyy" in p for p in prompts): raise ValueError("unknown word glosyy")
    return images.mean((1,2,3))*torch.tensor([float(len(p)) for p in prompts])
class Steering(SRPO):
    def step(self, model, reward, batch, rng):
        if rng.step==3 and not getattr(self,"done",0): self.done=1; steer("/tmp/rev/g/b", ["3d","glosyy"])
        yield from super().step(model,reward,batch,rng)
for resume in (False,True):
    try: train(mk(), Steering(SRPOSettings(**S)) if not resume else SRPO(SRPOSettings(**S)), fussy, ["a cat","a dog"], folder="/tmp/rev/g/b", steps=8, batch_size=2, checkpoint_every=2, progress=False, resume=resume); print("B ok")
    except Exception as e: print("B resume",resume, type(e).__name__, e)
for l in pathlib.Path("/tmp/rev/g/b/metrics.jsonl").read_text().splitlines():
    r=json.loads(l); print(r["step"],r["event"],r.get("positive"))
