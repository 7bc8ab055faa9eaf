// Draws each chart when it comes near the screen: a page of fifty opens as fast as one of two.
const dark = matchMedia('(prefers-color-scheme: dark)').matches
const colours = JSON.parse(document.getElementById('chart-colours').textContent)[dark ? 'dark' : 'light']
Bokeh.set_log_level('error')
for (const swatch of document.querySelectorAll('.legend i')) swatch.style.background = colours[swatch.dataset.colour] ?? swatch.dataset.colour

async function draw(place) {
  let text = document.getElementById(place.dataset.chart).textContent
  for (const [name, colour] of Object.entries(colours)) text = text.replaceAll(name, colour)
  const views = await Bokeh.embed.embed_item(JSON.parse(text), place)
  const plot = views.roots ? views.roots[0].model : [...views][0].model
  // A drag zooms where there is a mouse; on a touch screen it moves the page.
  if (!matchMedia('(any-pointer: coarse)').matches) plot.toolbar.active_drag = plot.toolbar.tools.find(tool => tool.type === 'BoxZoomTool')
  const choice = document.querySelector(`select[data-for="${place.dataset.chart}"]`)
  if (choice) {
    const show = () => {
      const source = plot.document.get_model_by_name('choice')
      source.data = {...source.data, y: source.data[choice.value]}
    }
    choice.addEventListener('change', show)
  }
  for (const name of document.querySelectorAll(`button[data-of="${place.dataset.chart}"]`)) name.addEventListener('click', () => {
    const on = name.getAttribute('aria-pressed') !== 'true'
    name.setAttribute('aria-pressed', on)
    for (const id of name.dataset.shown.split(' ')) plot.document.get_model_by_id(id).visible = on
  })
  place.classList.add('drawn')
}

const seen = new IntersectionObserver(entries => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue
    seen.unobserve(entry.target)
    draw(entry.target)
  }
}, {rootMargin: '400px'})
document.querySelectorAll('[data-chart]').forEach(place => seen.observe(place))
