import os, signal, time
from runs import Experiment
def test_term(tmp_path):
    e = Experiment(tmp_path, num_workers=2, num_train=4000, num_epochs=1)
    p = e.start()
    while not (e.run_dir/"metrics.jsonl").exists() or len(e.metrics())<5:
        time.sleep(.01)
    os.killpg(p.pid, signal.SIGTERM)
    print(p.wait(), p.output())
