"""What KFP forwards from a task to the TrainJob that its step creates."""

from kfp.dsl import TaskConfigField, TaskConfigPassthrough

FORWARDED = [
    # Only to the TrainJob: the step itself waits, and holds no GPU meanwhile.
    TaskConfigField.RESOURCES,
    TaskConfigField.KUBERNETES_AFFINITY,
    TaskConfigField.KUBERNETES_NODE_SELECTOR,
    TaskConfigField.KUBERNETES_TOLERATIONS,
    # To both: they exchange files on a volume.
    TaskConfigPassthrough(field=TaskConfigField.ENV, apply_to_task=True),
    TaskConfigPassthrough(field=TaskConfigField.KUBERNETES_VOLUMES, apply_to_task=True),
]
