"""Adaptive gates and reuse of block ranges written down from their cards: plain loops, one batch, one decision."""

from __future__ import annotations

from itertools import chain

from slow_references import SlowCache, relative


class SlowStack(SlowCache):
    """One residual over all blocks; a subclass says which steps are full."""

    residual = None

    def is_full(self, streams, context):
        raise NotImplementedError

    def through(self, streams, context, lists, glue):
        blocks, added = list(chain(*lists)), list(chain(*glue))
        if self.is_full(streams, context) or self.residual is None:
            self.strip += "F"
            streams, self.residual = self.run(blocks, added, streams)
            return streams
        self.strip += "c"
        return self.skip(self.residual, added, streams)


class SlowMagCache(SlowStack):
    """The released FLUX code's rule, line by line."""

    def __init__(self, net, ratios, threshold, max_run, retention, num_steps):
        super().__init__(net)
        self.threshold, self.max_run, self.retention, self.num_steps = threshold, max_run, retention, num_steps
        scale = (len(ratios) - 1) / (num_steps - 1)
        self.ratios = [ratios[round(i * scale)] for i in range(num_steps)]
        self.ratio, self.count, self.error = 1.0, 0, 0.0

    def is_full(self, streams, context):
        i = self.step
        if i < int(self.retention * self.num_steps + 0.5):
            return True
        self.ratio *= self.ratios[i]
        self.count += 1
        self.error += abs(1 - self.ratio)
        is_number_11 = round(i * (28 - 1) / (self.num_steps - 1)) == 11
        if self.error <= self.threshold and self.count <= self.max_run and not is_number_11:
            return False
        self.ratio, self.count, self.error = 1.0, 0, 0.0
        return True


class SlowEasyCache:
    """The released code's rule on a plain function of the latent; ``tied`` branches are not its concern."""

    def __init__(self, denoise, threshold, warmup, num_steps):
        self.denoise, self.threshold, self.warmup, self.num_steps = denoise, threshold, warmup, num_steps
        self.step, self.strip, self.total, self.k = -1, "", 0.0, None
        self.previous_input = self.previous_output = self.input_at_full = self.cache = None

    def __call__(self, **kwargs):
        self.step += 1
        x, is_full = kwargs["hidden_states"], True
        if self.step < self.warmup or self.step == self.num_steps - 1:
            self.total = 0.0
        elif self.k is not None:
            change = (x - self.previous_input).abs().mean()
            self.total += float(self.k * change / self.previous_output.abs().mean())
            is_full = self.total >= self.threshold
            if is_full:
                self.total = 0.0
        self.previous_input = x
        self.strip += "F" if is_full else "c"
        if not is_full:
            return (x + self.cache,)
        (out,) = self.denoise(**kwargs)
        self.cache = out - x
        if self.previous_output is not None:
            self.k = (out - self.previous_output).abs().mean() / (x - self.input_at_full).abs().mean()
        self.previous_output, self.input_at_full = out, x
        return (out,)


class SlowDeltaDiT(SlowCache):
    """Run the blocks before the range, add its residual, run those behind it."""

    def __init__(self, net, interval, count, switch):
        super().__init__(net)
        self.interval, self.count, self.switch, self.kept = interval, count, switch, {}

    def through(self, streams, context, lists, glue):
        blocks, added = list(chain(*lists)), list(chain(*glue))
        side = "rear" if self.step < self.switch else "front"
        p, q = (len(blocks) - self.count, len(blocks)) if side == "rear" else (0, self.count)
        streams, _ = self.run(blocks[:p], added[:p], streams)
        if self.step % self.interval == 0 or side not in self.kept:
            self.strip += "F"
            streams, self.kept[side] = self.run(blocks[p:q], added[p:q], streams)
        else:
            self.strip += "c"
            streams = self.skip(self.kept[side], added[p:q], streams)
        return self.run(blocks[q:], added[q:], streams)[0]


class SlowDBPrune(SlowCache):
    """Per block: its input against the one it last ran on."""

    def __init__(self, net, threshold, front, back, warmup, dynamic=False):
        super().__init__(net)
        self.threshold, self.front, self.back, self.warmup, self.dynamic = threshold, front, back, warmup, dynamic
        self.kept, self.pruned = {}, []

    def through(self, streams, context, lists, glue):
        blocks, added = list(chain(*lists)), list(chain(*glue))
        logged, pruned = [], []
        for k, (block, extra) in enumerate(zip(blocks, added, strict=True)):
            is_free = self.front <= k < len(blocks) - self.back
            if is_free and self.step >= self.warmup and k in self.kept:
                score, limit = relative(streams[0], self.kept[k][0]), self.threshold
                first = [d for d in logged[:5] if d > 0]
                if self.dynamic and first:
                    t = 1.25 * sum(first) / len(first)
                    if t < 2 * self.threshold:
                        limit = max(self.threshold, t)
                logged.append(score)
                if score < limit:
                    pruned.append(k)
                    streams = self.skip(self.kept[k][1], [extra], streams)
                    continue
            entered = streams[0]
            streams, residual = self.run([block], [extra], streams)
            if is_free:
                self.kept[k] = (entered, residual)
        self.pruned.append(pruned)
        return streams


class SlowAdaCache(SlowCache):
    """The released code: every block keeps its own residual, block ``measured`` says how long."""

    def __init__(self, net, thresholds, rates, measured, num_steps, motion=None):
        super().__init__(net)
        self.thresholds, self.rates, self.measured, self.num_steps = thresholds, rates, measured, num_steps
        self.motion, self.motion_before = motion, 1.0
        self.tau, self.last, self.kept = 1, 0, {}

    def through(self, streams, context, lists, glue):
        blocks, added, n = list(chain(*lists)), list(chain(*glue)), self.step + 1
        is_full = n == self.last + self.tau or n in (1, self.num_steps - 1, self.num_steps)
        tau = self.tau
        self.strip += "F" if is_full else "c"
        for k, (block, extra) in enumerate(zip(blocks, added, strict=True)):
            if not is_full:
                streams = self.skip(self.kept[k], [extra], streams)
                continue
            streams, residual = self.run([block], [extra], streams)
            if k == self.measured and k in self.kept:
                d = relative(residual[0], self.kept[k][0]) / tau
                self.tau = self.next_interval(d, residual[0], n, tau)
            self.kept[k] = residual
        if is_full:
            self.last = n
        return streams

    def next_interval(self, d, q, n, tau):
        if self.motion is not None:
            frames, low, high, scale, power, gain = self.motion
            mo = 1.0
            if low <= n <= high:
                later, earlier = q[:, q.shape[1] // frames :], q[:, : -(q.shape[1] // frames)]
                mo = float((later - earlier).abs().sum() / (later.abs().sum() + earlier.abs().sum()))
                mo = (mo / scale) ** power
            gradient = gain * (mo - self.motion_before) / tau
            self.motion_before = mo
            d *= mo + abs(gradient)
        for limit, rate in zip(self.thresholds, self.rates, strict=False):
            if d < limit:
                return rate
        return self.rates[-1]


class SlowDiCache(SlowCache):
    """The released FLUX code: probe, accumulate, resume or extrapolate."""

    def __init__(self, net, threshold, depth, retention, limit, num_steps, is_excess=False):
        super().__init__(net)
        self.threshold, self.depth, self.retention, self.limit = threshold, depth, retention, limit
        self.num_steps, self.is_excess = num_steps, is_excess
        self.total, self.stack, self.probe, self.probe_before, self.input_before = 0.0, [], [], None, None
        self.gammas = []

    def through(self, streams, context, lists, glue):
        blocks, added, x = list(chain(*lists)), list(chain(*glue)), streams
        probed, probe_residual = self.run(blocks[: self.depth], added[: self.depth], streams)
        if self.step <= int(self.retention * self.num_steps) or self.step == self.num_steps - 1:
            is_full, self.total = True, 0.0
        else:
            error = relative(probed[0], self.probe_before)
            if self.is_excess:
                error = abs(error - relative(x[0], self.input_before))
            self.scores.append(error)
            self.total += error
            is_full = self.total >= self.threshold
            if is_full:
                self.total = 0.0
        self.probe_before, self.input_before = probed[0], x[0]
        self.strip += "F" if is_full else "c"
        if is_full:
            streams, rest = self.run(blocks[self.depth :], added[self.depth :], probed)
            self.stack.append([a + b for a, b in zip(probe_residual, rest, strict=True)])
            self.probe.append(probe_residual[0])
            return streams
        if len(self.stack) < 2:
            return self.skip(self.stack[-1], added, x)
        far = (probe_residual[0] - self.probe[-2]).abs().mean()
        gamma = float((far / (self.probe[-1] - self.probe[-2]).abs().mean()).clip(1, self.limit))
        self.gammas.append(gamma)
        whole = [b + gamma * (a - b) for a, b in zip(self.stack[-1], self.stack[-2], strict=True)]
        return self.skip(whole, added, x)


class SlowBWCache(SlowCache):
    """Compare all blocks of neighbouring steps; once they are alike, reuse, refresh, reuse, and compute the rest."""

    def __init__(self, net, threshold, reuse, num_steps):
        super().__init__(net)
        self.threshold, self.num_steps, self.count = threshold, num_steps, max(int(reuse * num_steps), 1)
        self.outputs, self.plan = None, []

    def through(self, streams, context, lists, glue):
        blocks = list(chain(*lists))
        if self.plan and self.plan.pop(0) == "c":
            self.strip += "c"
            return self.held
        self.strip += "F"
        was_triggered, made = getattr(self, "is_triggered", False), []
        for block in blocks:
            streams = block(streams)
            made.append(streams[0])
        if self.outputs is not None and not was_triggered:
            score = sum(relative(now, then) for now, then in zip(made, self.outputs, strict=True)) / len(blocks)
            if score < self.threshold:
                remain = self.num_steps - self.step - 1
                half = remain - int(0.5 * remain)
                cycle = ("c" * self.count + "F") * self.num_steps
                self.plan, self.is_triggered = list(cycle[:half]) + ["F"] * (remain - half), True
        self.outputs, self.held = made, streams
        return streams
