// A click enlarges all pictures of a strip to half its width, so that a picture stands beside the one from before the
// training. Size, scroll position and focus outlast the redrawing with a new column.
const large = new Set(), places = new Map();
let held = null;
const films = () => [...element.querySelectorAll('.fl-film')];
const keyOf = (button) => button.closest('.fl-film').dataset.run + ' ' + button.dataset.sample;
const dress = (film) => {
  const is_large = large.has(film.dataset.run);
  const half = Math.max(130, Math.min(420, (film.clientWidth - 20) / 2));
  film.style.setProperty('--sample', is_large ? half + 'px' : '');
  film.querySelectorAll('button').forEach((one) => one.setAttribute('aria-pressed', is_large));
};
const drawn = () => films().forEach((film) => {
  dress(film);
  film.scrollLeft = places.get(film.dataset.run) ?? film.scrollWidth;
  const again = held && [...film.querySelectorAll('button')].find((one) => keyOf(one) === held);
  if (again && document.activeElement === document.body) again.focus({preventScroll: true});
});
element.addEventListener('scroll', ({target: film}) => {
  if (!film.matches('.fl-film')) return;
  const is_at_end = film.scrollLeft + film.clientWidth > film.scrollWidth - 8;
  is_at_end ? places.delete(film.dataset.run) : places.set(film.dataset.run, film.scrollLeft);
}, true);
element.addEventListener('focusin', (event) => {
  const button = event.target.closest('button[data-sample]');
  held = button && keyOf(button);
});
element.addEventListener('focusout', (event) => { if (event.relatedTarget) held = null; });
const toggle = (button, to) => {
  const film = button.closest('.fl-film'), run = film.dataset.run;
  to ? large.add(run) : large.delete(run);
  dress(film);
  button.scrollIntoView({block: 'nearest', inline: 'end'});
};
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-sample]');
  if (button) toggle(button, button.getAttribute('aria-pressed') !== 'true');
});
element.addEventListener('keydown', (event) => {
  const button = event.target.closest('button[data-sample]');
  if (button && event.key === 'Escape') toggle(button, false);
});
watch('value', drawn);
drawn();
