// On a phone the details are below the list, so a choice scrolls to them.
element.addEventListener('click', (event) => {
  const run = event.target.closest('button[data-run]');
  if (!run) return;
  element.querySelectorAll('button[data-run]').forEach((one) => one.setAttribute('aria-pressed', one === run));
  trigger('click', {run: run.dataset.run});
  const details = document.getElementById('run-details');
  if (details && details.getBoundingClientRect().top > innerHeight / 2) details.scrollIntoView();
});
