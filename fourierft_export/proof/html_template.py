"""The page of `render.render_html` as a jinja2 template; in Python, so that it always ships."""

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ "Agree" if report.ok else "Do not agree" }}: {{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
         color: #222; background: #fff; }
  h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
  .verdict { padding: .7rem 1rem; border-left: .4rem solid; border-radius: .2rem; }
  .good { border-color: #2c7a4b; background: #edf7f0; }
  .bad { border-color: #c0392b; background: #fdf0ee; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; font-size: .88rem; }
  th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #ddd;
           vertical-align: top; }
  td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
  tr.failed td { background: #fdf0ee; }
  img { max-width: 100%; }
  footer, .quiet { color: #666; font-size: .85rem; }
</style>
</head>
<body>
<h1>Validation</h1>
<p>{{ title }}</p>
<div class="verdict {{ 'good' if report.ok else 'bad' }}">
{% for line in verdict %}
  <div>{{ line }}</div>
{% endfor %}
</div>

<h2>Sides</h2>
<div class="wide"><table>
<tr><th>side</th><th>weights</th><th>outputs</th><th>seconds</th><th>from</th><th>notes</th></tr>
{% for side in report.sides %}
<tr><td>{{ side.name|printable }}</td><td>{{ side.precision }}</td>
<td>{{ shapes(side.outputs)|printable }}</td><td class="n">{{ "%.1f"|format(side.seconds) }}</td>
<td>{{ side.source|printable }}</td><td>{{ side.notes|join("; ")|printable }}</td></tr>
{% endfor %}
</table></div>
<p class="quiet">Inputs: {{ shapes(report.input_shapes)|printable }}</p>

<h2>Pairs</h2>
<div class="wide"><table>
<tr><th>left</th><th></th><th>right</th><th>output</th><th>max abs</th><th>max rel</th>
<th>mean abs</th><th>rms</th><th>allowed</th><th>cosine</th><th>argmax</th><th>verdict</th></tr>
{% for row in rows %}
<tr{% if row.reason %} class="failed"{% endif %}>
<td>{{ row.left }}</td><td>{{ "=" if row.expect == "equal" else "≠" }}</td>
<td>{{ row.right }}</td><td>{{ row.output }}</td>
<td class="n">{{ row.max_abs }}</td><td class="n">{{ row.max_rel }}</td>
<td class="n">{{ row.mean_abs }}</td><td class="n">{{ row.rms }}</td>
<td class="n">{{ row.allowed }}</td><td class="n">{{ row.cosine }}</td>
<td class="n">{{ row.argmax }}</td><td>{{ row.verdict }}
{%- if row.reason %}: {{ row.reason }}{% endif %}</td></tr>
{% endfor %}
</table></div>
<p class="quiet">Pairs marked = must agree: the largest difference is bounded by a fraction of the
output's scale, and its root mean square by a fraction of what the adapter changes. Pairs marked ≠
must differ by more than arithmetic explains. Padded positions are left out.</p>
{% if picture %}
<img alt="Differences of every pair on a logarithmic axis"
     src="data:image/png;base64,{{ picture }}">
{% endif %}
{% if report.notes %}

<h2>Notes</h2>
<ul>
{% for note in report.notes %}
  <li>{{ note|printable }}</li>
{% endfor %}
</ul>
{% endif %}
<footer>{{ versions }}</footer>
</body>
</html>
"""
