"""The page's HTML. Jinja escapes every text; what a chart returns is markup."""

#: The policy lets the page load nothing and run nothing, whatever a class or a student is called.
PAGE = """\
{% macro table(texts, css="", beside={}) %}
{# `beside`: columns with the columns that follow in the same cell. On a phone a row is a list. #}
<table class="{{ css }}"><thead><tr>
{% for title in texts if title not in beside.values() %}<th>{{ title }}</th>{% endfor %}
</tr></thead><tbody>
{% for row in texts.to_dict("records") %}<tr>
{% for title, text in row.items() if title not in beside.values() %}
<td data-label="{{ title }}"><span
{%- if title == "verdict" %} class="verdict {{ text | replace(" ", "-") }}"{% endif %}>{{ text }}
{%- set more = row[beside[title]] if title in beside else "" %}
{%- if more not in ("", "-") %} <small>{{ more }}</small>{% endif -%}
</span></td>
{% endfor %}
</tr>{% endfor %}
</tbody></table>
{% endmacro %}

{% macro legend(roles) %}
<div class="legend">
{% for role in roles %}<span class="{{ role }}"><i></i><b>{{ role }}</b></span>{% endfor %}
</div>
{% endmacro %}

{% macro grid(drawings, css="") %}
<div class="grid {{ css }}">
{% for title, chart, note in drawings %}
<figure class="card"><h3>{{ title }}</h3>{{ chart }}
{% if note %}<figcaption>{{ note }}</figcaption>{% endif %}</figure>
{% endfor %}
</div>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:">
<title>Comparison of distilled students with baselines</title>
<style>{{ style | safe }}</style>
</head>
<body>
<header><h1>Comparison of distilled students with baselines</h1>
<p class="muted">Students: {{ comparison.gains | length }}, each distilled and as a baseline, on
{{ whole(comparison.labels | length) }} test images of
{{ whole(comparison.class_names | length) }} classes</p></header>
<section class="card summary">
{% for sentence in sentences %}<p>{{ sentence }}</p>{% endfor %}
</section>

<section><h2>Students</h2>
<p class="note">Gain: accuracy of the distilled student minus that of its baseline, the same network
trained without the teacher, in percentage points, with its 95 % interval. Retention: accuracy of
the distilled student divided by the teacher's.</p>
<div class="card">{{ table(students, beside={
  "gain": "95% interval", "parameters": "compression", "MACs": "fewer MACs"
}) }}</div></section>

<section><h2>Gain, accuracy and cost</h2>
<p class="note">Dots are test accuracies with their 95 % intervals. The dashed line is the Pareto
front: no network is both cheaper and more accurate than one on it.</p>
{{ legend(["distilled", "baseline", "teacher"]) }}
{{ grid(gain_and_cost, "wide") }}</section>

<section><h2>Speed</h2>
<p class="note">Time from an image in memory to its logits, in float32, with all networks measured
in turn. Speed-up: the teacher's time for one image divided by the network's, median of rounds, with
its 95 % interval. A baseline is as fast as its student. Times differ from run to run and from
machine to machine.</p>
<div class="stack">
{% for label, texts in speed %}
<figure class="card"><h3>{{ label }}</h3>{{ table(texts) }}</figure>
{% endfor %}
</div></section>

{% if cache | length %}
<section><h2>Teacher passes made and saved</h2>
<p class="note">A pass is one image through the teacher. It takes as long for the cache as in a
training step, so the number of passes decides. benchmarks/README.md compares the cost of writing
and reading the store with that of a forward pass.</p>
<div class="card">{{ table(cache) }}</div></section>
{% endif %}

<section><h2>Training curves</h2>
<p class="note">Accuracy on the validation images. The dot marks the best epoch.</p>
{{ legend(["distilled", "baseline"]) }}
{{ grid(training_curves) }}</section>

<section><h2>Calibration</h2>
<p class="note">Accuracy of the predictions with a certain confidence. Below the diagonal a network
is overconfident. A dot's area is its share of the images.</p>
{{ legend(["distilled", "baseline", "teacher"]) }}
{{ grid(calibration, "small") }}</section>

<section><h2>Under corruption</h2>
<p class="note">Accuracy on {{ whole(comparison.robustness.images) }} test images under
{{ corrupted | length }} common corruptions at severities {{ severities }} of 5; the curves are
means over the corruptions. Robust accuracy is the mean over all corruptions and severities;
relative: divided by the accuracy on the same images without corruption. The 95 % interval alone
decides whether a gain is significant.</p>
{{ legend(["distilled", "baseline", "teacher"]) }}
{{ grid(under_corruption) }}
<div class="stack"><div class="card">{{ table(robustness, "dense", {"network": "role"}) }}</div>
<div class="card"><h3>A test image at severity {{ shown_severity }}</h3><div class="strip">
{% for name, pixels in corrupted.items() %}
<figure>{{ picture(pixels, name) }}<figcaption>{{ name }}</figcaption></figure>
{% endfor %}
</div></div></div></section>

<section><h2>Accuracy by class</h2>
<p class="note">Accuracy of the distilled student minus that of its baseline, in points. To the
right the distilled student is better, to the left its baseline. A class has
{{ whole(class_images.min()) }} to {{ whole(class_images.max()) }} test images; one image is
{{ "%.2g" % (100 / [1, class_images.max()] | max) }} points or more.
{% if many_classes %}
Shown are the {{ extremes }} classes with the largest gains and the {{ extremes }} with the
smallest; class_accuracy.csv beside this page has all.
{% endif %}</p>
{{ grid(class_gains) }}</section>

<section><h2>Agreement with the teacher by class</h2>
<p class="note">Test images by the predictions of teacher and distilled student. On the diagonal
they agree.</p>
<div class="grid">
{% for name, counts, note in agreement %}
<figure class="card"><h3>{{ name }}</h3>
{% if not many_classes %}
{{ heat_map(counts, "Teacher and " ~ name) }}
{% elif counts.sum() == counts.trace() %}
<p>They agree on every test image.</p>
{% else %}
{{ table(disagreements_table(counts), "dense") }}
{% endif %}
<figcaption>{{ note }}</figcaption></figure>
{% endfor %}
</div></section>

<section><h2>Test images on which they disagree</h2>
<p class="note">Images for which teacher, distilled student and baseline do not all predict the same
class, those with the student's largest KL divergence from the teacher first.</p>
<div class="stack">
{% for name, samples in disagreements.items() %}
<div class="card"><h3>{{ name }} <span class="muted">{{ whole(samples | length) }} of \
{{ whole(comparison.labels | length) }} images</span></h3>
{% if samples %}<div class="strip">{% else %}<p>They agree on every image.</p>{% endif %}
{% for i in samples[:9] %}
<figure>{{ picture(pixels_of(i), "test image %d, %s" % (i, class_name(comparison.labels[i]))) }}
<figcaption><b>{{ class_name(comparison.labels[i], 20) }}</b><br>
{% set gain = comparison.gains[name] %}
{% for model in (comparison.teacher, gain.first, gain.second) %}
{% set css, mark = ("correct", "✓") if model.correct[i] else ("wrong", "✗") %}
{{ model.role }} <span class="{{ css }}">{{ class_name(model.decisions[i], 20) }} {{ mark }}</span>\
<br>{% endfor %}</figcaption></figure>
{% endfor %}
{% if samples %}</div>{% endif %}</div>
{% endfor %}
</div></section>

{% if pairs | length %}
<section><h2>Students compared</h2>
<p class="note">Accuracy of the first distilled student minus that of the second. McNemar's exact
test, with p-values adjusted for the number of pairs (Holm).</p>
<div class="card">{{ table(pairs, beside={"difference": "95% interval"}) }}</div></section>
{% endif %}

<section><h2>All metrics</h2>
<p class="note">NLL: negative log-likelihood of the label, and KL(teacher || model), means in nats.
ECE: expected calibration error, 15 bins; scaled: after dividing the logits by the temperature T
that minimises the NLL of the validation images (-: every validation image is classified correctly,
so NLL has no minimum). Agreement: share of test images with the teacher's class.</p>
<div class="card">
{{ table(metrics, "dense", {"network": "role", "accuracy": "95% interval"}) }}
</div></section>

<section><h2>Parameters and versions</h2>
<div class="card long"><dl>
{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}
</dl><details open><summary>params.yaml</summary><pre>{{ params }}</pre></details></div></section>
</body>
</html>
"""
