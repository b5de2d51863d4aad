"""Values from the paper, shown next to ours (Ouyang et al., 2022).

Values of plots were read off the plots; all others are stated in the text.
"""

SIZES = ("1.3B", "6B", "175B")
SizeValues = tuple[tuple[float, float, float], ...]  # (value, low, high) of each size
PolicyTable = dict[str, SizeValues]

# Figure 1, repeated as figure 3 "training | Instruct": win rate against the 175B SFT.
WIN_RATES: PolicyTable = {
    "GPT": ((0.142, 0.109, 0.173), (0.193, 0.156, 0.227), (0.240, 0.201, 0.278)),
    "GPT prompted": ((0.227, 0.186, 0.267), (0.266, 0.226, 0.306), (0.411, 0.366, 0.455)),
    "SFT": ((0.348, 0.304, 0.392), (0.404, 0.360, 0.447), (0.500, 0.500, 0.500)),
    "PPO": ((0.524, 0.476, 0.570), (0.578, 0.534, 0.622), (0.626, 0.582, 0.671)),
    "PPO-ptx": ((0.527, 0.480, 0.573), (0.555, 0.510, 0.601), (0.660, 0.615, 0.705)),
}
# Figure 3, "held-out | Instruct".
HELD_OUT_WIN_RATES: PolicyTable = {
    "GPT": ((0.191, 0.155, 0.225), (0.218, 0.182, 0.254), (0.252, 0.216, 0.288)),
    "GPT prompted": ((0.251, 0.210, 0.290), (0.306, 0.264, 0.345), (0.431, 0.390, 0.472)),
    "SFT": ((0.461, 0.415, 0.506), (0.505, 0.461, 0.548), (0.500, 0.500, 0.500)),
    "PPO": ((0.663, 0.618, 0.708), (0.694, 0.653, 0.736), (0.691, 0.651, 0.730)),
    "PPO-ptx": ((0.641, 0.596, 0.687), (0.685, 0.644, 0.726), (0.709, 0.672, 0.746)),
}
# Figure 3, "training | GPT" and "held-out | GPT": against the 175B SFT on the same prompts.
GPT_WIN_RATES: PolicyTable = {
    "GPT": ((0.142, 0.102, 0.180), (0.171, 0.132, 0.209), (0.218, 0.175, 0.261)),
    "SFT": ((0.315, 0.265, 0.364), (0.389, 0.344, 0.436), (0.500, 0.500, 0.500)),
    "PPO": ((0.499, 0.444, 0.553), (0.614, 0.568, 0.661), (0.592, 0.540, 0.643)),
    "PPO-ptx": ((0.422, 0.367, 0.475), (0.509, 0.461, 0.557), (0.612, 0.563, 0.664)),
}
HELD_OUT_GPT_WIN_RATES: PolicyTable = {
    "GPT": ((0.232, 0.190, 0.273), (0.195, 0.156, 0.233), (0.278, 0.234, 0.321)),
    "SFT": ((0.438, 0.387, 0.488), (0.409, 0.360, 0.458), (0.500, 0.500, 0.500)),
    "PPO": ((0.557, 0.507, 0.608), (0.608, 0.559, 0.657), (0.640, 0.591, 0.689)),
    "PPO-ptx": ((0.565, 0.516, 0.614), (0.554, 0.504, 0.605), (0.624, 0.577, 0.672)),
}
# Figure 31, "training | Instruct": grades from 1 to 7.
LIKERT: PolicyTable = {
    "GPT": ((2.26, 2.12, 2.39), (2.19, 2.06, 2.31), (2.52, 2.42, 2.62)),
    "GPT prompted": ((2.69, 2.53, 2.86), (2.70, 2.55, 2.86), (3.48, 3.34, 3.61)),
    "SFT": ((3.38, 3.21, 3.56), (3.58, 3.40, 3.76), (3.96, 3.86, 4.05)),
    "PPO": ((4.16, 3.98, 4.35), (4.36, 4.18, 4.54), (4.58, 4.40, 4.77)),
    "PPO-ptx": ((4.26, 4.08, 4.44), (4.24, 4.06, 4.43), (4.78, 4.66, 4.91)),
}
# Figure 4: share of responses with each flag, pooled over the three sizes.
FLAG_SHARES: dict[str, dict[str, float]] = {
    "attempts": {
        "GPT": 0.696,
        "GPT prompted": 0.792,
        "SFT": 0.864,
        "PPO": 0.923,
        "PPO-ptx": 0.928,
    },
    "constraint": {
        "GPT": 0.223,
        "GPT prompted": 0.282,
        "SFT": 0.340,
        "PPO": 0.435,
        "PPO-ptx": 0.433,
    },
    "hallucinates": {
        "GPT": 0.448,
        "GPT prompted": 0.279,
        "SFT": 0.084,
        "PPO": 0.215,
        "PPO-ptx": 0.156,
    },
    "appropriate": {
        "GPT": 0.814,
        "GPT prompted": 0.853,
        "SFT": 0.880,
        "PPO": 0.904,
        "PPO-ptx": 0.903,
    },
}
# Section 3.4: how often two labelers agree, and the half-width of the interval.
AGREEMENT = {"training labelers": (0.726, 0.015), "held-out labelers": (0.773, 0.013)}
# Section 4.1: accuracy of reward models on each comparison set, and its half-width.
ACCURACY = {"labelers": (0.724, 0.004), "held-out labelers": (0.696, 0.009)}
