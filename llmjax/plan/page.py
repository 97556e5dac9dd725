def render(plan):
  return ''
