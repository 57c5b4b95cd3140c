"""Speed of training, decoding, rollouts and evaluation, beside peers; `launch.bench` runs them."""
