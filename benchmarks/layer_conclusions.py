"""What the layer-choices benchmark was, in words, and what its runs of one day said."""

WRITTEN = "2026-11-21"

METHOD = """\
One pass at a constant rate, torch's default initialization, all of BNPreconditioner's defaults; within a seed all
methods share initial weights and order. CIFAR-10, standardized, test accuracy on 2,000 images: the five-layer CNN
(zero padding, pooling after layers 2 and 4, smallest map 8 × 8) on 8,000 images at batch size 64 and 3,200 at 4; a
ResNet-8 (16-32-64 channels, one block a stage) on 6,400 and 2,560. Text: the standard library's own source files as
words, signs and line ends (2,000 most frequent + one for the rest), the next token from the 8 before it
(embedding 64, hidden 128), 1,500 steps of 64; validation loss in nats on 4,096 positions of held-out files.
BNP-SGD is SGD without momentum with P Pᵀ g, BNP-AdamW the two-sided form.

Tables: mean ± standard error; a row's best rate is bold; a run that ends in NaN scores chance, and so does a text run
whose loss is above it (ln 2,001). "At each one's best rate": every seed is scored at the rate that is best on the
*other* seeds, so that none chooses the rate it is judged at; the rates in brackets are the best ones by the mean of
all seeds. Differences are alternative minus reference, paired by seed; for text, negative is better.

Trimmed, for time: five rates a method in steps of √10 instead of the whole grid (chosen by a few runs with another
seed; "grid mean" is over these five), short passes, two to three seeds as each row says. Accuracies are those of the
first 100 to 800 steps of a training, and the plain bases, SGD most, have barely begun by then."""

CONCLUSIONS = {
    "1": """\
**Keep the rank-one P.** Where nothing else centres the activations, plain columns lose by 12 to 16 points at their best
rate and by 6 to 15 over the grid, in all four settings; around AdamW they fall below plain AdamW (.240 against .270
at batch 64, best rates of the table), which rank-one lifts to .380. Behind BatchNorm, which takes what a layer's mean
input adds out of its output, little depends on the choice: averaged over the four settings plain columns are
.008 ± .004 below at the best rate and .008 ± .003 over the grid; at the best rate rank-one is ahead in three settings
(by .015 to .031) and behind in one (SGD at 64, by .029 ± .013). Rank-one runs took 2 to 16 % longer on this machine,
which was shared. Both forms had the package's q², whose trace is of centred inputs and so is too small a bound for
plain columns: with a larger one they would bear higher nominal rates; that smaller steps alone do not help them is
what the lower rates of the grid show. ResNet-8 without any normalization was planned and not run.""",
    "2": """\
**Not worth it on maps of 8 × 8 and more.** Averaged over the four settings, patch statistics gain .010 ± .009 at the
best rate and .004 ± .006 over the grid; of eight differences one, of +.008, is beyond two standard errors. A corner
tap is inside the map at .94 of the positions of a 32 × 32 map and at .77 of an 8 × 8 one, so there is little to
correct. As measured here (unfolded) they made a run 3 times as long at batch 64 and 1.8 times at 4; the formula by
occupancy would be nearly free, so smaller maps (4 × 4: .56 at the corner) could still be tried. They were not here,
nor was the net without biases.""",
    "3": """\
**Not in this form: most of the gain is a larger rate for the embedding.** A one-hot input has E[aaᵀ] = diag(f), so P is
diagonal but for a rank-one term (‖v‖² = .8). Under SGD a token's gradient row is f times its mean gradient, and P Pᵀ
divides it by f(1 - f) plus the floor; the floor (ε1·max σ² + ε2 = .0011) lies above all but 77 of the 2,001 tokens
(those 77 are 79 % of the text), so rare tokens get one common factor of about 860, and the most frequent one 10. Under
Adam, which normalizes every coordinate already, P multiplies updates by 3 (frequent) to 29 (rare). Against an
embedding that is passed through, scaling gains .172 ± .010 nats at the best rate under SGD and .026 ± .007 under AdamW
(.239 and .102 over the grid). But the control, the embedding's rate times 100 (SGD) or 10 (AdamW) for all tokens
alike, keeps most of that under SGD and gains more than that under AdamW: scaling by frequency is .046 ± .004 better
than the control under SGD, and .061 ± .009 *worse* under AdamW. (The factors 100 and 10 were not tuned.) So what the
embedding lacks beside preconditioned layers is step size; the frequencies themselves help SGD a little and hurt
AdamW, with which embeddings are mostly trained. Tracking 2,001 dense one-hot columns made a run 1.3 to 1.5 times as
long.""",
}
