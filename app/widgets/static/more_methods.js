() => {
  const are_all = document.getElementById('method').classList.toggle('fl-all');
  document.getElementById('more-methods').setAttribute('aria-expanded', are_all);
  return {__type__: 'update', value: are_all ? 'Fewer methods' : 'More methods'};
}
