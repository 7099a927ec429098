// One listener for all rows, as rows come and go. The pointer's place in one picture is applied to the whole row.
const cellOf = (event) => event.target.closest('.fl-cell:not(.fl-open)');
const aim = (cell, event) => {
  const box = cell.getBoundingClientRect(), line = cell.parentElement;
  line.style.setProperty('--x', Math.round(100 * (event.clientX - box.left) / box.width) + '%');
  line.style.setProperty('--y', Math.round(100 * (event.clientY - box.top) / box.height) + '%');
};
element.addEventListener('click', (event) => {
  const cell = cellOf(event);
  if (!cell) return;
  aim(cell, event);
  cell.parentElement.classList.toggle('fl-zoomed');
});
element.addEventListener('pointermove', (event) => {
  const cell = cellOf(event);
  if (cell && cell.parentElement.classList.contains('fl-zoomed')) aim(cell, event);
});
element.addEventListener('keydown', (event) => {
  const cell = cellOf(event);
  if (!cell || (event.key !== 'Enter' && event.key !== ' ' && event.key !== 'Escape')) return;
  event.preventDefault();
  const line = cell.parentElement;
  line.style.setProperty('--x', '50%');
  line.style.setProperty('--y', '50%');
  line.classList.toggle('fl-zoomed', event.key === 'Escape' ? false : undefined);
});
