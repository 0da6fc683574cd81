"""The words of docs/results/retrofit.md; `redraw_retrofit.py` puts the numbers in."""

PAGE = """# What another norm placement costs a trained model

`periln retrofit` folds what is exact and calibrates the rest. This page is about the rest: output norms in a model
that was trained without them. In SmolLM2-135M plain output norms leave nothing usable, and five of its thirty layers
decide that. With a large epsilon, `--soften 10`, the same norms cost {soft10_kl:.3f} nats of KL and no loss that can be
seen, without any training, and the largest stream that the weights allow falls from {bound_source:.1e} to
{bound_soft10:.1e}. With those five layers left as they were, hard norms in the other 25 and a million tokens of healing
end {healed_rise:.2f} nats above the source, but most of the massive activation that the norms had removed comes back.
On tiny models calibration costs little.

## SmolLM2-135M becomes `sandwich`

SmolLM2-135M-Instruct (Pre-LN, 30 layers; Q4_1 weights widened to FP32) got an output norm after every attention and
MLP. It was calibrated on {samples} windows of {tokens} tokens of WikiText-2's validation split; "other text" is
{check} other windows of it. Losses are in nats a token; chance is ln(49,152) = 10.80.

{smollm2}

The import is exact (largest difference of logits {exact:g}). No rule is usable. Unit gains, one scalar and the root
mean square of channels end above chance. Least squares, the best of the four, ends at {best:.1f} where the source has
{base:.1f}.

A norm makes the branches of all tokens equally large, so what a gain cannot explain is how much that size differs
from token to token. With least squares half of the places leave less than {median:.0%} of the branch's squares
unexplained. Four leave more than half of them: {large}.
(The scalar's median is lower and its loss is higher: it explains a stream that its first layers have spoiled.)

SmolLM2 has a massive activation: from layer 12's MLP on, the first token has 2.9e4 in channel 507, and typical
entries are some thousand times smaller. That MLP is also the place with the most unexplained. No gain is right both
for that token and for the others, and the layers after it are calibrated on a stream that they were never trained on.

## A dial between the two placements

Two options change that. `--keep` leaves layers as they are in the source. `--soften X` gives a new output norm an
epsilon of X times the largest mean square that a token's branch has on the calibration text: with a large X the norm is
nearly a constant factor for what was calibrated on, and still bounds what is larger. All rows are by least squares.
"Stream, at most" is what [`periln bounds`](../reference/command-line.md) proves of the stream's largest entry from the
weights alone, for any input. FP16 ends at 65504.

{variants}

- **A few layers decide.** Keeping layer 12 brings {best:.1f} to {keep12:.1f}. Keeping the layers of the four places
  above and layer 30 brings it to {keep:.2f}, {keep_rise:.2f} above the source.
- **Softening gives the loss back sooner than the bound goes.** At 10 the loss is the source's to {soft10_rise:.3f}
  nats and the bound is {times10:.0f} times smaller than the source's; at 1 it is {soft1_rise:.2f} nats higher and
  {times1:.0f} times smaller, with {above1} of {tensors} stream tensors above FP16's limit where the source has
  {above_source}. At 0.1 none is above it, and the model is lost.
- **The bound is the stream's.** What a branch computes before its output norm keeps the source's bound, since its
  matrices are the source's.
- `peri` and `output` without softening are little better than `sandwich`: {peri:.1f} and {output:.1f}. With
  `--soften 10` `peri` ends at {peri10:.2f}. `output`, which also loses its input norms, ends at {output10:.1f}, worse
  than without; why was not looked into.

## What the models then do

{around}

## Healing with a million tokens

{smollm2_healing}

## Tiny models

A Pre-LN model of 4 layers and 128 channels was trained on 410 thousand tokens of WikiText-2 (vocabulary 2,048),
calibrated on 32 windows of 128 tokens of other text and checked on 32 more:

{tiny_rules}

Least squares leaves 0.13 nats for `peri` and 0.16 for `output`, which also loses its input norms. Unit gains are bad
here too. Least squares explains most and is best here, but not always: for the smaller model below, the scalar was
best.
{healing}
## What was not measured

- Healing of SmolLM2 with more than a million tokens, with other layers kept or with softened norms, and on the text's
  own tokens.
- All items of the five tasks; more than one seed but for the smaller tiny model; any model between 1M and 135M
  parameters.

## How to have these numbers again

{commands}

Measured on 2026-11-29 on one thread of a shared 2-core {processor} CPU, torch {torch}, transformers {transformers}.
This page is drawn from `docs/results/records/retrofit/` by `docs/results/redraw_retrofit.py`.
"""

COMMANDS = """
    periln retrofit SMOLLM2 OUT --to sandwich --data validation.parquet --samples 20 --check-samples 8 --tokens 128
    periln retrofit SMOLLM2 SOFT --to sandwich --soften 10 --rules least-squares --data ... (as above)
    periln bounds SOFT --data test.txt --samples 2 --out bounds
    periln retrofit-report SMOLLM2 OUT SOFT --data test.txt --samples 8 --tokens 128 --out report
    periln retrofit SMOLLM2 KEEP --to sandwich --keep 2,3,12,29,30 --heal DATA --data ... (as above)
    periln pretrain --config KEEP/heal/1-gains.yaml --set steps=60 sequence_length=128 precision.mode=bf16
    periln pretrain --config KEEP/heal/2-all.yaml --set steps=917 sequence_length=128 precision.mode=bf16
    periln retrofit-report SMOLLM2 KEEP GAINS ALL --data test.txt --samples 8 --tokens 128 --tasks hub --limit 60 ...
"""

AROUND = """On {samples} windows of {tokens} tokens of WikiText-2's test split:

![Loss above the source's, the stream over depth, and what formats cost](records/retrofit/smollm2.png)

Hard norms leave a massive activation in the stream that is {hard:.0f} times smaller, but the MLP's output before its
norm has {branch:.1e}, and FP16 has to hold that too. Softened norms keep it where it was, with its headroom and about
its costs in INT8: the model computes nearly the same function, within a bound that it did not have before. With the
five layers kept and hard norms elsewhere the activation is {smaller:.1f} times smaller, FP16 has {more_bits:.1f} bits
more, and INT8 costs a little less; the price is {price:.2f} nats, which healing would have to give back. The columns of
formats are shares of each model's own loss, and say nothing of a model that is worse than chance."""

SMOLLM2_HEALED = """The model with the five layers kept is trained in BF16 on KL from the source, on C4 and LIMA and
no text of WikiText, 8 windows of 128 tokens a step: {gains_tokens} thousand tokens for the new gains alone at a rate of
0.002, then {all_tokens} thousand for everything at 0.0002. That took 1.6 hours on one thread, beside other work. The
run was killed once and resumed; the records of the {again} steps that it did twice were the same. On 8 windows of the
test split, from another copy of its text than above, so that losses compare only within this table:

![Loss above the source's, the stream over depth, and what formats cost](records/retrofit/smollm2-heal.png)

{table}

- **The loss comes back.** Of {price:.2f} nats the gains alone give back {gains_back:.2f} and the million tokens
  {back:.2f}; {left:.2f} are left. The KL from the source is {kl:.2f}: a model nearly as good, and not the same one.
- **The massive activation comes back too.** It was {source_massive:.1e} in the source, {kept_massive:.1e} after
  calibration, and {massive:.1e} when everything had been trained. FP16 had {source_bits:.1f} bits left in the source
  and {kept_bits:.1f} after calibration; it has {bits:.1f} now, so {bits_left:.1f} of the {bits_won:.1f} bits gained
  remain. The largest value is in layer 12 in the source and the healed model, and in layer 29 in between. Layer 12 is
  one of the five without an output norm, so nothing limits what its MLP adds. Training the gains alone keeps the
  headroom.
- **Most formats end up in between.** INT8 activations cost {int8} (source, calibrated, healed), and MXFP4 for weights
  and activations {mxfp4}. FP8 E4M3 activations are the exception: they cost least in the healed model.

On the first {limit} items of each of the five tasks (accuracy in percent):

{tasks}

Accuracies on so few items do not tell these models apart. The bits a byte of the right answers put the four models in
the order of their losses in each of the five tasks; the difference between the source and the healed model is small."""

HEALED = """A smaller Pre-LN model (3 layers, 64 channels, tied head, {source_tokens} thousand tokens, peak rate 0.004)
became `peri`, three times, each time with another seed. The {rule} rule was best on the calibration text (24
windows of 64 tokens) each time. Then healing: 6 thousand tokens for the new gains alone, then 55 thousand for
everything, at a peak rate of 0.002, either on KL from the source or on the text's own tokens. Beside them what
the same tokens do otherwise: the source trained on for as many, and both placements trained from the start for
as many as source and healing together. 48 windows of 64 tokens of held-out text, means of three seeds:"""

HEALING_SAYS = """Calibration costs {calibrated:.3f} nats, the gains alone give back {gains:.3f} of it, and
training everything on
KL leaves {kl:.3f}. On the text's own tokens the same training leaves {ce:.3f} with {times:.0f} times the KL: as
good a model, and a different one. Headroom does not move, and neither do the formats of the records: nothing
was wrong with them.

But `peri` from the start, with as many tokens in all, ends {start:.2f} nats below the source, and Pre-LN from
the start {pre_start:.2f}. Only this rate was tried. Here the placement pays while the model is being trained; a
retrofit keeps what the source has learned, and that was worth less. It is no way to a better tiny model. What it
does to a checkpoint that nobody can train again is above."""
